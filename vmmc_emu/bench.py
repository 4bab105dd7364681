"""Measuring: one ordinary socket program, run over VMMC on two nodes and over kernel TCP on loopback.

The program (``vmmc-bench``) knows nothing of VMMC.  Measurements of different paths are interleaved, so
that what else the machine does meets all of them; several rounds, and the median of them, because a
shared machine has bad moments.

    with Cluster(nodes=2) as cluster, ExitStack() as stack:
        paths = [over_vmmc(cluster, stack), over_tcp(stack)]
        report = measure(KINDS["latency"], paths, rounds=5)
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from vmmc_emu.cluster import Cluster
from vmmc_emu.paths import native_file

Sample = dict[str, Any]
"""One line of the measuring program."""


@dataclass(frozen=True)
class Kind:
    """What is measured, and how a figure is made of what the program says."""

    name: str
    title: str
    unit: str
    mode: str  # the measuring program's
    sizes: tuple[int, ...]
    lower_is_better: bool
    figure: Callable[[Sample], float]


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "latency", "one-way latency", "µs", "latency",
            (1, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576), True,
            lambda sample: float(sample["one_way_us"]),
        ),
        Kind(
            "bandwidth", "bandwidth", "GB/s", "stream",
            (1, 16, 64, 256, 1460, 4096, 16384, 65536, 262144, 1048576), False,
            lambda sample: sample["bytes"] / sample["seconds"] / 1e9,
        ),
        Kind(
            "messages", "small writes", "million/s", "stream",
            (1, 8, 64, 256, 1024), False,
            lambda sample: sample["writes"] / sample["seconds"] / 1e6,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Path:
    """A way from client to server, and how to run one measurement over it."""

    name: str
    run: Callable[[str, int, float], Sample]  # (mode, bytes a write, seconds)


@dataclass
class Row:
    """All figures for one size of write."""

    size: int
    figures: dict[str, list[float]] = field(default_factory=dict)  # path's name: one figure a round

    def median(self, path: str) -> float:
        """The middle one of that path's figures."""
        return median(self.figures[path])


@dataclass
class Report:
    """What was measured, ready to be shown or written as JSON."""

    kind: Kind
    rounds: int
    seconds: float
    rows: list[Row]

    def times_better(self, row: Row, other: str) -> float:
        """How many times better VMMC is than `other` for that size: above 1 is better."""
        ours, theirs = row.median("vmmc"), row.median(other)
        return theirs / ours if self.kind.lower_is_better else ours / theirs

    def as_dict(self) -> dict[str, Any]:
        """For JSON: medians, extremes and every round's figure."""
        rows = []
        for row in self.rows:
            entry: dict[str, Any] = {"size": row.size}
            for path, figures in row.figures.items():
                entry[path] = {
                    "median": row.median(path), "min": min(figures), "max": max(figures), "rounds": figures,
                }  # fmt: skip
                if path != "vmmc":
                    entry[f"times_better_than_{path}"] = self.times_better(row, path)
            rows.append(entry)
        return {
            "bench": self.kind.name, "unit": self.kind.unit, "rounds": self.rounds,
            "seconds_each": self.seconds, "rows": rows,
        }  # fmt: skip

    def as_table(self) -> Iterator[str]:
        """Lines for a terminal."""
        paths = list(self.rows[0].figures)
        yield f"{self.kind.title}, {self.kind.unit}: median of {self.rounds} (lowest to highest)"
        header = f"{'bytes':>9}"
        for path in paths:
            header += f"  {path:>8} {'':21}"
        yield (header + "".join(f"  vs {path}" for path in paths[1:])).rstrip()
        for row in self.rows:
            line = f"{row.size:>9}"
            for path in paths:
                figures = row.figures[path]
                spread = f"({short(min(figures))} to {short(max(figures))})"
                line += f"  {short(row.median(path)):>8} {spread:<21}"
            for path in paths[1:]:
                line += f"  x{self.times_better(row, path):.1f}"
            yield line


def short(value: float) -> str:
    """Three digits, or all of an integer."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def measure(
    kind: Kind,
    paths: Sequence[Path],
    *,
    rounds: int = 5,
    sizes: Sequence[int] | None = None,
    seconds: float = 0.1,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Report:
    """Measures every size over every path, `rounds` times, `seconds` each; interleaved."""
    report = Report(
        kind, rounds, seconds, [Row(size, {path.name: [] for path in paths}) for size in sizes or kind.sizes]
    )
    total, done = rounds * len(report.rows) * len(paths), 0
    for round_number in range(rounds):
        for row in report.rows:
            # Who goes first changes from round to round: what the first leaves behind (a warm
            # core, full caches) helps the second.
            for path in paths if round_number % 2 == 0 else reversed(paths):
                progress(done, total, f"{path.name}, {row.size} B")
                row.figures[path.name].append(kind.figure(path.run(kind.mode, row.size, seconds)))
                done += 1
    progress(done, total, "")
    return report


def _client(host: str, port: int, mode: str, size: int, seconds: float) -> list[str]:
    if mode == "connect":
        return [str(native_file("vmmc-bench")), mode, host, str(port), f"{seconds:.4f}"]
    return [str(native_file("vmmc-bench")), mode, host, str(port), str(size), f"{seconds:.4f}"]


def sample_of(finished: subprocess.CompletedProcess[str]) -> Sample:
    """What the measuring program said; RuntimeError when it failed."""
    if finished.returncode != 0:
        command = " ".join(finished.args[1:])
        raise RuntimeError(
            f"vmmc-bench {command} ended with status {finished.returncode}: {finished.stderr.strip()}"
        )
    sample: Sample = json.loads(finished.stdout)
    return sample


def serving_port(server: subprocess.Popen[str], stack: contextlib.ExitStack) -> int:
    """The port of a measuring server that was just started; `stack` ends it."""
    stack.callback(end, server)
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line.startswith("listening "):
        raise RuntimeError(f"vmmc-bench server did not start, status {server.wait()}")
    return int(line.split()[1])


def end(server: subprocess.Popen[str]) -> None:
    """Kills a program and takes its end."""
    server.kill()
    server.wait()
    for stream in (server.stdin, server.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def over_tcp(stack: contextlib.ExitStack) -> Path:
    """The path over kernel TCP on loopback; its server ends with `stack`."""
    server = subprocess.Popen([native_file("vmmc-bench"), "server", "0"], stdout=subprocess.PIPE, text=True)
    port = serving_port(server, stack)

    def run(mode: str, size: int, seconds: float) -> Sample:
        command = _client("127.0.0.1", port, mode, size, seconds)
        return sample_of(subprocess.run(command, capture_output=True, text=True, timeout=120, check=False))

    return Path("tcp", run)


def over_unix() -> Path:
    """The path over an AF_UNIX socket pair between two processes: the kernel's shortest stream."""

    def run(mode: str, size: int, seconds: float) -> Sample:
        command = [str(native_file("vmmc-bench")), "pair", mode, str(size), f"{seconds:.4f}"]
        return sample_of(subprocess.run(command, capture_output=True, text=True, timeout=120, check=False))

    return Path("unix", run)


def over_vmmc(
    cluster: Cluster,
    stack: contextlib.ExitStack,
    *,
    client: int = 0,
    server: int = 1,
    serving: Sequence[str] = ("vmmc-bench", "server", "0"),
    env: Mapping[str, str] | None = None,
) -> Path:
    """The path between two nodes of a running cluster; its server, `serving`, ends with `stack`.

    env: added to the environment of server and client.
    """
    process = cluster.node(server).popen(
        [str(native_file(serving[0])), *serving[1:]], stdout=subprocess.PIPE, text=True, env=env
    )
    port = serving_port(process, stack)

    def run(mode: str, size: int, seconds: float) -> Sample:
        command = _client(f"node{server}", port, mode, size, seconds)
        return sample_of(
            cluster.node(client).run(
                command, capture_output=True, text=True, timeout=120, check=False, env=env
            )
        )

    return Path("vmmc", run)
