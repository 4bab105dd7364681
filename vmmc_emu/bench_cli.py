"""`vmmc-emu bench`: measures from the command line."""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vmmc_emu import bench as measuring
from vmmc_emu import bench_all as everything_of
from vmmc_emu import bench_paper as curves
from vmmc_emu.cluster import Cluster
from vmmc_emu.errors import ClusterError
from vmmc_emu.terminal import explained


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


_command(measuring.KINDS["latency"], "One-way latency of messages of 1 B to 1 MiB.")
_command(measuring.KINDS["bandwidth"], "Bytes a second in one direction, in writes of 1 B to 1 MiB.")
_command(measuring.KINDS["messages"], "Small writes a second in one direction.")


def _paths(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    """`tcp,unix` as a list."""
    names = [name for name in (value or "").split(",") if name]
    for name in names:
        if name not in {"tcp", "unix"}:
            raise click.BadParameter(f"{name!r} is not a path: tcp and unix are.")
    return names


def _names(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[str]:
    """`connect,redis-1`, or several such, as a list."""
    return [name for value in values for name in value.split(",") if name]


@bench.command("all")
@click.option(
    "--vs", callback=_paths, metavar="tcp,unix", help="Measure these paths too, and show the ratios."
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 1000))
@click.option(
    "--seconds", default=0.5, show_default=True, type=click.FloatRange(0.001, 600),
    help="How long each measurement lasts.",
)  # fmt: skip
@click.option(
    "--ring", "rings", multiple=True, default=(8, 64), show_default=True, type=click.IntRange(2, 256),
    help="Nodes that a token is passed around; repeats.",
)  # fmt: skip
@click.option(
    "--idle-seconds", default=10.0, show_default=True, type=click.FloatRange(0.01, 600),
    help="How long the CPU time of an idle cluster of 8 is counted.",
)  # fmt: skip
@click.option(
    "--only", multiple=True, callback=_names, metavar="ROW,...",
    help="These rows, by the names that --json has for them; repeats.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def everything(
    context: click.Context,
    vs: list[str],
    rounds: int,
    seconds: float,
    rings: tuple[int, ...],
    idle_seconds: float,
    only: list[str],
    as_json: bool,
) -> None:
    """Everything: latency, bandwidth, connections, redis, loaded and idle machines, a token's hops.

    "All cores held" is while one CPU-bound program for each core runs.  "unix" is an AF_UNIX socket pair
    between two processes; what needs addresses is not measured over it.  Clusters for a token and for
    idleness are started for the time.
    """
    rows: list[everything_of.Row] = []
    skipped: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        known = [*everything_of.ROWS, *(f"ring-{nodes}" for nodes in rings), "idle"]
        for name in only:
            if name not in known:
                raise click.UsageError(f"--only {name}: no such row; there are {', '.join(known)}.")
        wanted = set(only or known)
        cluster = _cluster(context, stack)
        rows += everything_of.socket_rows(cluster, vs, stack)
        if wanted & everything_of.REDIS_ROWS:
            redis = everything_of.redis_rows(cluster, vs, stack)
            rows += redis
            if not redis:
                skipped["redis"] = "redis-server and redis-benchmark are not installed"
        rows = [row for row in rows if row.name in wanted]
        for nodes in (nodes for nodes in rings if f"ring-{nodes}" in wanted):
            click.echo(f"starting a cluster of {nodes} nodes for the token", err=True)
            ring = stack.enter_context(Cluster(nodes=nodes, name=f"bench-{secrets.token_hex(4)}"))
            rows.append(everything_of.ring_row(ring, vs, stack))
        machine = everything_of.measure_rows(rows, rounds=rounds, seconds=seconds, progress=_progress())
    if "idle" in wanted:
        click.echo(f"counting the CPU time of an idle cluster for {idle_seconds:g} s", err=True)
        with Cluster(nodes=8, name=f"bench-{secrets.token_hex(4)}") as idle, contextlib.ExitStack() as stack:
            row = everything_of.idle_row(idle, 100, idle_seconds, stack)
            everything_of.measure_rows([row], rounds=1, seconds=0.01)
        rows.append(row)
    for name, why in skipped.items():
        click.echo(f"{name} is not measured: {why}", err=True)
    if as_json:
        report = everything_of.as_dict(rows, machine, skipped, rounds=rounds, seconds=seconds)
        click.echo(json.dumps(report, indent=2))
        return
    if not rows:
        return
    for line in everything_of.as_table(rows):
        click.echo(line)
    click.echo()
    for line in everything_of.as_bars(rows):
        click.echo(line)
    click.echo()
    click.echo(everything_of.as_noise(rows, machine))


@bench.command("paper")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 1000))
@click.option(
    "--seconds", default=0.2, show_default=True, type=click.FloatRange(0.001, 600),
    help="How long each measurement lasts.",
)  # fmt: skip
@click.option(
    "--size", "sizes", multiple=True, type=click.IntRange(1, 1 << 20),
    help="Bytes a message; repeats.  [default: 4 B to 1 MiB]",
)  # fmt: skip
@click.option(
    "--plot", "prefix", default="vmmc-paper", show_default=True, metavar="PREFIX",
    help="Draw PREFIX.png and PREFIX.svg.",
)  # fmt: skip
@click.option("--no-plot", is_flag=True, help="Only measure.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@explained
def paper(
    rounds: int, seconds: float, sizes: tuple[int, ...], prefix: str, no_plot: bool, as_json: bool
) -> None:
    """The curves of 1997: sockets with and without redirection, and VMMC, in the profile myrinet-1997.

    On a cluster of its own, in real time, beside the figures that were published.  The machine should
    have nothing else to do: a wire of microseconds cannot wait for a busy core.
    """
    if not no_plot:
        curves.check_plot(Path(prefix))
    report = curves.measure(
        rounds=rounds, sizes=sorted(set(sizes)) or curves.SIZES, seconds=seconds, progress=_progress()
    )
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        for line in report.as_table():
            click.echo(line)
    if not no_plot:
        for path in curves.plot(report, Path(prefix)):
            click.echo(f"drawn: {path}", err=as_json)


@bench.command("redirection")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 1000))
@click.option(
    "--seconds", default=0.25, show_default=True, type=click.FloatRange(0.001, 600),
    help="How long each measurement lasts.",
)  # fmt: skip
@click.option(
    "--size", "sizes", multiple=True, default=(65536, 262144, 1048576), show_default=True,
    type=click.IntRange(1, 1 << 25), help="Bytes a receive; may be repeated.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def redirection(
    context: click.Context, rounds: int, seconds: float, sizes: tuple[int, ...], as_json: bool
) -> None:
    """Receives into memory that the NIC reaches, beside receives into the program's own.

    A receive that waits has posted its address: bytes go straight there, copied once.  Elsewhere they go
    to the default buffer first, and the library copies them out.

    asked: each block is asked for by its receiver, so it finds the receive posted.  stream: a sender that
    does not wait, and is often ahead of the receiver.
    """
    with contextlib.ExitStack() as stack:
        report = everything_of.redirection(
            _cluster(context, stack), stack,
            sizes=sizes, rounds=rounds, seconds=seconds, progress=_progress(),
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    for line in everything_of.redirection_table(report):
        click.echo(line)
