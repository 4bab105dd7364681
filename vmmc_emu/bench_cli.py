"""`vmmc-emu bench`: measures from the command line."""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
from collections.abc import Callable
from typing import Any

import click

from vmmc_emu import bench as measuring
from vmmc_emu.cluster import Cluster
from vmmc_emu.errors import ClusterError


@click.group("bench")
def bench() -> None:
    """Measure latency, bandwidth or small writes between two nodes.

    An ordinary socket program is run unmodified on node0 and node1 of the cluster, or of one that is
    started for it, and with --vs tcp over the kernel's TCP on loopback too, interleaved.  Shown are the
    median of several rounds and the lowest and highest.
    """


def _command(kind: measuring.Kind, text: str) -> None:
    """Adds `bench KIND`."""

    @bench.command(kind.name, help=text)
    @click.option("--vs", type=click.Choice(["tcp"]), help="Measure this path too, and show the ratio.")
    @click.option(
        "--rounds",
        default=5,
        show_default=True,
        type=click.IntRange(1, 1000),
        help="Rounds to take the median of.",
    )
    @click.option(
        "--seconds", default=20.0, show_default=True, type=click.FloatRange(0.1, 3600),
        help="How long all measurements together last.",
    )  # fmt: skip
    @click.option(
        "--size", "sizes", multiple=True, type=click.IntRange(1, 1 << 26), help="Bytes a write; repeats."
    )
    @click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    @click.pass_context
    def command(
        context: click.Context,
        vs: str | None,
        rounds: int,
        seconds: float,
        sizes: tuple[int, ...],
        as_json: bool,
    ) -> None:
        with contextlib.ExitStack() as stack:
            cluster = _cluster(context, stack)
            paths = [measuring.over_vmmc(cluster, stack)]
            if vs == "tcp":
                paths.append(measuring.over_tcp(stack))
            count = rounds * len(sizes or kind.sizes) * len(paths)
            report = measuring.measure(
                kind, paths, rounds=rounds, sizes=sizes or None, seconds=seconds / count, progress=_progress()
            )
        if as_json:
            click.echo(json.dumps(report.as_dict(), indent=2))
        else:
            for line in report.as_table():
                click.echo(line)


def _cluster(context: click.Context, stack: contextlib.ExitStack) -> Cluster:
    """The running cluster that is meant, or one of our own that ends with `stack`."""
    name = context.find_root().params.get("cluster")
    try:
        cluster = Cluster.running(name)
    except ClusterError:
        click.echo("no cluster is up: measuring on one of two nodes, started for this", err=True)
        return stack.enter_context(Cluster(nodes=2, name=f"bench-{secrets.token_hex(4)}"))
    if len(cluster.nodes) < 2:
        raise ClusterError(f"cluster '{cluster.name}' has one node, and bench needs two")
    return cluster


def _progress() -> Callable[[int, int, str], Any]:
    """Shows on stderr how far it is: one line that changes on a terminal, a line a tenth elsewhere."""
    terminal = sys.stderr.isatty()
    said = -1

    def show(done: int, total: int, what: str) -> None:
        nonlocal said
        if terminal:
            text = f"{done}/{total}  {what}" if done < total else ""
            click.echo(f"\r\033[K{text}", err=True, nl=False)
        elif done * 10 // total > said:
            said = done * 10 // total
            click.echo(f"measured {done} of {total}", err=True)

    return show


_command(
    measuring.KINDS["latency"], "One-way latency of messages of 1 B to 1 MiB."
)
_command(measuring.KINDS["bandwidth"], "Bytes a second in one direction, in writes of 1 B to 1 MiB.")
_command(measuring.KINDS["messages"], "Small writes a second in one direction.")
