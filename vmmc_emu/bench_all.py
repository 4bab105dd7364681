"""Measuring everything: the rows of `vmmc-emu bench all`, and what redirection saves.

A row is one figure, measured over VMMC and over other paths in turn, round by round.  Its measurement is a
function of seconds; what it needs (servers, rings of programs) stands as long as an ExitStack.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil

from vmmc_emu.bench import KINDS, Path, end, over_tcp, over_unix, over_vmmc, short
from vmmc_emu.cluster import Cluster
from vmmc_emu.paths import native_file

Measurement = Callable[[float], float]
"""Seconds to measure for: the figure."""

Progress = Callable[[int, int, str], None]

ANSWER_S = 120.0  # for a program that is to say a line: longer, and it hangs
BAR = 48  # characters of the longest bar
LOOK_S = 0.3  # at the machine, before each round


@dataclass
class Row:
    """One line of the table: its paths, and a figure a round of each."""

    name: str
    title: str
    unit: str
    lower_is_better: bool
    paths: dict[str, Measurement]
    loaded: bool = False  # while CPU-bound programs hold every core
    figures: dict[str, list[float]] = field(default_factory=dict)

    def times_better(self, other: str) -> float | None:
        """How many times better VMMC is than `other`."""
        ours, theirs = median(self.figures["vmmc"]), median(self.figures[other])
        good, bad = (ours, theirs) if self.lower_is_better else (theirs, ours)
        return bad / good if good > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        entry: dict[str, Any] = {
            "name": self.name, "title": self.title, "unit": self.unit,
            "lower_is_better": self.lower_is_better,
        }  # fmt: skip
        for path, figures in self.figures.items():
            entry[path] = {
                "median": median(figures), "min": min(figures), "max": max(figures), "rounds": figures,
            }  # fmt: skip
            if path != "vmmc":
                entry[f"times_better_than_{path}"] = self.times_better(path)
        return entry


@dataclass
class Machine:
    """How quiet the machine was."""

    others: list[float] = field(default_factory=list)  # share of CPU time others took while we did nothing
    steal: float = 0.0  # share of CPU time that the hypervisor took, over the whole measurement

    def as_dict(self, rows: Sequence[Row]) -> dict[str, Any]:
        """For JSON, with the spread of the rounds: (highest - lowest) / median."""
        return {
            "cores": os.cpu_count(),
            "others_cpu": max(self.others, default=0.0),
            "steal": self.steal,
            "spread_median": median(spreads) if (spreads := _spreads(rows)) else None,
            "spread_max": max(spreads, default=None),
        }


def _spreads(rows: Sequence[Row]) -> list[float]:
    figures = [each for row in rows for each in row.figures.values() if len(each) > 1 and median(each) > 0]
    return [(max(each) - min(each)) / median(each) for each in figures]


def cpu_times() -> tuple[float, float, float]:
    """Of all cores since boot, from /proc/stat: seconds used, stolen, and in all."""
    times = psutil.cpu_times()
    stolen = float(times.steal)
    # guest time is counted in user time already
    total = sum(times) - times.guest - times.guest_nice
    return total - times.idle - times.iowait - stolen, stolen, total


def _look(machine: Machine, seconds: float) -> None:
    """What is used while we do nothing is used by others."""
    used, _, total = cpu_times()
    time.sleep(seconds)
    used_now, _, total_now = cpu_times()
    if total_now > total:
        machine.others.append((used_now - used) / (total_now - total))


def measure_rows(
    rows: Sequence[Row], *, rounds: int, seconds: float, progress: Progress = lambda done, total, what: None
) -> Machine:
    """Fills in the figures: every path of every row once a round, for `seconds`."""
    machine = Machine()
    total, done = rounds * sum(len(row.paths) for row in rows), 0
    _, stolen, all_time = cpu_times()
    for number in range(rounds):
        _look(machine, min(LOOK_S, seconds))
        for row in rows:
            # As in bench.measure: who goes first changes.
            for path, run in list(row.paths.items())[:: 1 if number % 2 == 0 else -1]:
                progress(done, total, f"{row.title}, {path}")
                with _all_cores_held() if row.loaded else contextlib.nullcontext():
                    figure = run(seconds)
                row.figures.setdefault(path, []).append(figure)
                done += 1
    progress(done, total, "")
    _, stolen_now, all_now = cpu_times()
    machine.steal = (stolen_now - stolen) / max(all_now - all_time, 1e-9)
    for row in rows:  # the order in which they are shown
        row.figures = {path: row.figures[path] for path in row.paths}
    return machine


@contextlib.contextmanager
def _all_cores_held() -> Iterator[None]:
    """While a CPU-bound program runs for each core."""
    with contextlib.ExitStack() as stack:
        for _ in os.sched_getaffinity(0):
            stack.callback(end, subprocess.Popen([native_file("vmmc-bench"), "spin"], text=True))
        yield


REDIS_ROWS = {"redis-50", "redis-1"}
ROWS = [
    "latency-1", "latency-4k", "bandwidth-64k", "bandwidth-1m", "bandwidth-1460", "writes-64", "connect",
    "loaded-latency-1", "loaded-bandwidth-64k", *sorted(REDIS_ROWS),
]  # fmt: skip
"""Names of the rows of socket_rows and redis_rows."""


# ---- rows between two nodes ----


def socket_rows(cluster: Cluster, vs: Sequence[str], stack: contextlib.ExitStack) -> list[Row]:
    """What the socket program measures between two nodes."""
    over = [over_vmmc(cluster, stack)]
    if "tcp" in vs:
        over.append(over_tcp(stack))
    if "unix" in vs:
        over.append(over_unix())

    def row(name: str, title: str, kind: str, size: int, loaded: bool = False) -> Row:
        what = KINDS[kind]

        def through(path: Path) -> Measurement:
            return lambda seconds: what.figure(path.run(what.mode, size, seconds))

        paths = {path.name: through(path) for path in over}
        return Row(name, title, what.unit, what.lower_is_better, paths, loaded)

    def connects(path: Path) -> Measurement:
        def run(seconds: float) -> float:
            sample = path.run("connect", 1, seconds)
            return float(sample["connects"] / sample["seconds"])

        return run

    connecting = {path.name: connects(path) for path in over if path.name != "unix"}
    return [
        row("latency-1", "one-way latency, 1 B", "latency", 1),
        row("latency-4k", "one-way latency, 4 KiB", "latency", 4096),
        row("bandwidth-64k", "bandwidth, 64 KiB writes", "bandwidth", 65536),
        row("bandwidth-1m", "bandwidth, 1 MiB writes", "bandwidth", 1 << 20),
        row("bandwidth-1460", "bandwidth, 1460 B writes", "bandwidth", 1460),
        row("writes-64", "64 B writes", "messages", 64),
        Row("connect", "connect, 1 B exchange, close", "/s", False, connecting),
        row("loaded-latency-1", "one-way latency, 1 B, all cores held", "latency", 1, True),
        row("loaded-bandwidth-64k", "bandwidth, 64 KiB writes, all cores held", "bandwidth", 65536, True),
    ]


def redis_rows(cluster: Cluster, vs: Sequence[str], stack: contextlib.ExitStack) -> list[Row]:
    """redis-benchmark; none where redis is not installed."""
    if not (shutil.which("redis-server") and shutil.which("redis-benchmark")):
        return []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = [
        "redis-server", "--port", str(port), "--save", "", "--appendonly", "no", "--protected-mode", "no",
    ]  # fmt: skip
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "text": True}
    stack.callback(end, cluster.node(1).popen(serve, **quiet))
    cluster.node(1).wait_for_port(port, timeout=ANSWER_S)
    if "tcp" in vs:
        stack.callback(end, subprocess.Popen([*serve, "--bind", "127.0.0.1"], **quiet))
        _await_tcp(port)

    def rate(path: str, clients: int, a_second: int) -> Measurement:
        host = "node1" if path == "vmmc" else "127.0.0.1"
        runner: Any = cluster.node(0).run if path == "vmmc" else subprocess.run

        def run(seconds: float) -> float:
            # It counts requests, not seconds: twice as many as kernel TCP answers in the time.
            requests = max(clients, int(2 * a_second * seconds))
            command = [
                "redis-benchmark", "-h", host, "-p", str(port), "-c", str(clients), "-n", str(requests),
                "-t", "get", "--csv",
            ]  # fmt: skip
            said = runner(command, capture_output=True, text=True, timeout=ANSWER_S, check=True).stdout
            for line in csv.reader(said.splitlines()):
                if line and line[0] == "GET":
                    return float(line[1])
            raise RuntimeError(f"redis-benchmark did not say how fast it was: {said!r}")

        return run

    paths = ["vmmc", *(["tcp"] if "tcp" in vs else [])]
    return [
        Row(
            f"redis-{clients}", f"redis-benchmark GET, {clients} connections" if clients > 1
            else "redis-benchmark GET, 1 connection", "/s", False,
            {path: rate(path, clients, a_second) for path in paths},
        )
        for clients, a_second in ((50, 60_000), (1, 20_000))
    ]  # fmt: skip


def _await_tcp(port: int) -> None:
    """Returns when somebody listens there."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


# ---- rows of whole clusters ----


def ring_row(cluster: Cluster, vs: Sequence[str], stack: contextlib.ExitStack) -> Row:
    """A token that is passed around all nodes: the time of a hop."""
    count = len(cluster)
    paths = {"vmmc": _ring(count, cluster, stack)}
    if "tcp" in vs:
        paths["tcp"] = _ring(count, None, stack)
    return Row(f"ring-{count}", f"a hop of a token around {count} nodes", "µs", True, paths)


def _line(process: subprocess.Popen[str]) -> str:
    """The next line that a program says."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], ANSWER_S)
    line = process.stdout.readline() if ready else ""
    if not line:
        raise RuntimeError(f"{process.args!r} says nothing, status {process.poll()}")
    return line


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _ring(count: int, cluster: Cluster | None, stack: contextlib.ExitStack) -> Measurement:
    """A ring of programs, one a node; over TCP on loopback without a cluster."""
    members = []
    for index in range(count):
        command = [str(native_file("vmmc-bench")), "ring", "pass" if index else "lead"]
        start: Any = cluster.node(index).popen if cluster else subprocess.Popen
        members.append(start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        stack.callback(end, members[-1])
    ports = [int(_line(each).split()[1]) for each in members]
    for index, each in enumerate(members):
        after = (index + 1) % count
        _tell(each, f"{f'node{after}' if cluster else '127.0.0.1'} {ports[after]}")
    for each in members:
        _line(each)

    def run(seconds: float) -> float:
        _tell(members[0], f"{seconds:.4f}")
        said = json.loads(_line(members[0]))
        return float(said["seconds"] / said["rounds"] / count * 1e6)

    return run


def idle_row(cluster: Cluster, connections: int, seconds: float, stack: contextlib.ExitStack) -> Row:
    """CPU time of a cluster, its programs included, whose connections do nothing for `seconds`."""
    count = len(cluster)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = []

    def start(node: int, *arguments: str) -> subprocess.Popen[str]:
        process = cluster.node(node).popen([str(native_file("vmmc-bench")), *arguments], **pipes)
        processes.append(process.pid)
        stack.callback(end, process)
        return process

    ports = []
    for node in range(count):
        server = start(node, "server", "0")
        ports.append(int(_line(server).split()[1]))
    for node in range(count):
        after, share = (node + 1) % count, connections // count + (node < connections % count)
        _line(start(node, "hold", f"node{after}", str(ports[after]), str(share)))
    status = cluster.status()
    processes.append(status["supervisor_pid"])
    processes += [node[f"{what}_pid"] for node in status["nodes"] for what in ("daemon", "nic")]

    def used() -> float:
        return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in processes if pid)

    def run(_: float) -> float:
        before = used()
        time.sleep(seconds)
        return (used() - before) * 1e3

    title = f"CPU time in {seconds:g} s, idle cluster of {count}, {connections} connections"
    return Row("idle", title, "ms", True, {"vmmc": run})


# ---- redirection ----


WAYS = {"with": "heap", "without": "own"}
"""What vmmc-bench-receive is told, to receive with redirection and without."""

PATTERNS = {"asked": "the receiver posts, then asks", "stream": "the sender does not wait"}


def redirection(
    cluster: Cluster,
    stack: contextlib.ExitStack,
    *,
    sizes: Sequence[int],
    rounds: int,
    seconds: float,
    progress: Progress = lambda done, total, what: None,
) -> dict[str, Any]:
    """Receives into memory that the NIC reaches, beside receives into the program's own: copies a byte, GB/s.

    Between nodes each byte is copied once by the receiving NIC, and again by the library when it was
    placed in a default buffer; the counters of the receiving node tell how many were.
    """
    total, rows = rounds * len(WAYS) * len(PATTERNS) * len(sizes), list[dict[str, Any]]()
    done = itertools.count()
    for size in sizes:
        paths = {
            way: over_vmmc(cluster, stack, serving=("vmmc-bench-receive", memory, str(size)))
            for way, memory in WAYS.items()
        }
        for pattern in PATTERNS:
            figures: dict[str, list[float]] = {way: [] for way in WAYS}
            counted = {
                way: dict.fromkeys(("bytes_received", "bytes_redirected", "bytes_copied"), 0) for way in WAYS
            }
            for number in range(rounds):
                for way in list(WAYS)[:: 1 if number % 2 == 0 else -1]:
                    progress(next(done), total, f"{pattern}, {size} bytes, {way} redirection")
                    before = cluster.node(1).counters()
                    sample = paths[way].run(pattern, size if pattern == "asked" else 65536, seconds)
                    figures[way].append(KINDS["bandwidth"].figure(sample))
                    after = cluster.node(1).counters()
                    for name in counted[way]:
                        counted[way][name] += after[name] - before[name]
            row: dict[str, Any] = {"size": size, "pattern": pattern}
            for way, counts in counted.items():
                received = max(counts["bytes_received"], 1)
                row[way] = {
                    "copies_per_byte": 1 + counts["bytes_copied"] / received,
                    "redirected": counts["bytes_redirected"] / received,
                    "gb_s": {
                        "median": median(figures[way]), "min": min(figures[way]), "max": max(figures[way]),
                        "rounds": figures[way],
                    },
                }  # fmt: skip
            row["gain"] = row["with"]["gb_s"]["median"] / row["without"]["gb_s"]["median"]
            rows.append(row)
    progress(total, total, "")
    return {"bench": "redirection", "rounds": rounds, "seconds_each": seconds, "rows": rows}


def redirection_table(report: dict[str, Any]) -> Iterator[str]:
    """Lines for a terminal."""
    yield f"receives: copies a byte, and GB/s: median of {report['rounds']} (lowest to highest)"
    for pattern, meaning in PATTERNS.items():
        yield ""
        yield f"{pattern}: {meaning}"
        yield f"{'bytes':>10}  {'with redirection':<40}  {'without':<40}  gain"
        for row in report["rows"]:
            if row["pattern"] != pattern:
                continue
            line = f"{row['size']:>10}"
            for way in WAYS:
                entry = row[way]
                rate = entry["gb_s"]
                spread = f"{short(rate['median'])} ({short(rate['min'])} to {short(rate['max'])})"
                line += f"  {entry['copies_per_byte']:>5.2f}  {spread:<33}"
            yield f"{line}  x{row['gain']:.2f}"


# ---- showing ----


def as_dict(
    rows: Sequence[Row], machine: Machine, skipped: dict[str, str], *, rounds: int, seconds: float
) -> dict[str, Any]:
    """For JSON."""
    return {
        "bench": "all", "rounds": rounds, "seconds_each": seconds, "machine": machine.as_dict(rows),
        "rows": [row.as_dict() for row in rows], "skipped": skipped,
    }  # fmt: skip


def as_table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines for a terminal: medians, extremes and ratios."""
    paths = list(dict.fromkeys(path for row in rows for path in row.figures))
    width = max(len(row.title) + len(row.unit) + 2 for row in rows)
    yield (
        f"{'median (lowest to highest)':<{width}}"
        + "".join(f"  {path:>8} {'':19}" for path in paths)
        + "".join(f"  {'vs ' + path:>8}" for path in paths if path != "vmmc")
    )
    for row in rows:
        line = f"{row.title + ', ' + row.unit:<{width}}"
        for path in paths:
            figures = row.figures.get(path)
            middle = short(median(figures)) if figures else "-"
            spread = f"({short(min(figures))} to {short(max(figures))})" if figures else ""
            line += f"  {middle:>8} {spread:<19}"
        for path in paths:
            if path != "vmmc":
                times = row.times_better(path) if path in row.figures else None
                line += f"  {f'x{times:.1f}' if times is not None else '-':>8}"
        yield line.rstrip()


def as_bars(rows: Sequence[Row]) -> Iterator[str]:
    """A bar chart: within a row the longest bar is the largest figure."""
    for row in rows:
        medians = {path: median(figures) for path, figures in row.figures.items()}
        most = max(medians.values())
        yield f"{row.title}, {row.unit} ({'less' if row.lower_is_better else 'more'} is better)"
        for path, value in medians.items():
            eighths = round(value / most * BAR * 8) if most > 0 else 0
            bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
            yield f"  {path:<5} {bar} {short(value)}"


def as_noise(rows: Sequence[Row], machine: Machine) -> str:
    """One line about the machine."""
    told = machine.as_dict(rows)
    line = (
        f"machine: {told['cores']} cores; others took up to {told['others_cpu']:.0%} of the CPU between"
        f" rounds; stolen {told['steal']:.1%}"
    )
    if told["spread_median"] is not None:
        line += (
            f"; rounds spread by {told['spread_median']:.0%} of their median,"
            f" {told['spread_max']:.0%} at worst"
        )
    return line
