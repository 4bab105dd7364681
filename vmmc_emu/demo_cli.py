"""`vmmc-emu demo`: the list of demos, and running one."""

from __future__ import annotations

import sys

import click

from vmmc_emu import demo as demos


@click.command("demo")
@click.argument("name", required=False, type=click.Choice(list(demos.DEMOS)), metavar="[NAME]")
def demo(name: str | None) -> None:
    """Show what this is for: run a demo on a cluster of its own, or list them.

    Each takes a few seconds, leaves nothing behind, and ends with status 1 when something that it
    says does not happen.
    """
    if name is None:
        click.echo("Demos (vmmc-emu demo NAME):")
        for each, line in demos.DEMOS.items():
            click.echo(f"  {each:<12} {line}")
        return
    try:
        demos.run(name, demos.Stage())
    except demos.DemoFailed as failure:
        click.echo(f"demo {name}: {failure}", err=True)
        sys.exit(1)
