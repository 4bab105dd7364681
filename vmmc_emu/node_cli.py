"""`vmmc-emu node`: takes the power from nodes, and gives it back."""

from __future__ import annotations

import click

from vmmc_emu import lifecycle, names
from vmmc_emu.paths import ClusterPaths
from vmmc_emu.terminal import explained


@click.group("node")
def node() -> None:
    """Take the power from nodes, or give it back.

    \b
      vmmc-emu node kill 3
      vmmc-emu node start 3
    """


_NODES = click.argument("nodes", nargs=-1, required=True, metavar="NODES...")


@node.command()
@_NODES
@click.pass_obj
@explained
def kill(place: ClusterPaths, nodes: tuple[str, ...]) -> None:
    """Let nodes lose their power: 3, node3, 0,2,5 or 0-3.

    All their processes, programs included, end at once (SIGKILL), and their memory is gone.
    Connections of other nodes with them fail with "Connection timed out", which TCP says after minutes
    of silence; new ones get "No route to host" until the node is started.
    """
    _power(place, nodes, on=False)


@node.command()
@_NODES
@click.pass_obj
@explained
def start(place: ClusterPaths, nodes: tuple[str, ...]) -> None:
    """Give nodes their power back: they are empty, and ready when this returns."""
    _power(place, nodes, on=True)


def _power(place: ClusterPaths, texts: tuple[str, ...], *, on: bool) -> None:
    for each in names.node_set(texts, lifecycle.describe_running(place).nodes):
        lifecycle.power_node(place, each, on=on)
        click.echo(f"{names.node_name(each)} is {'up, and empty' if on else 'off'}.")
