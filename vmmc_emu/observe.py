"""What can be seen of a running cluster without disturbing it: counters, sockets, programs, logs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from vmmc_emu import processes
from vmmc_emu._native import ffi, lib
from vmmc_emu.names import node_name
from vmmc_emu.paths import ClusterPaths

_COUNTERS_MOST = 256


@dataclass(frozen=True)
class Socket:
    """One VMMC socket, as `ss` would show it."""

    node: str
    state: str  # LISTEN, ESTAB, …
    local: str  # address:port
    peer: str
    receive_queue: int  # bytes that the program has yet to read; LISTEN: connections to accept
    send_queue: int  # bytes that the peer has yet to read; LISTEN: the backlog
    received: int
    sent: int
    pid: int
    command: str

    @property
    def port(self) -> int:
        """The local port."""
        digits = self.local.rpartition(":")[2]
        return int(digits) if digits.isdigit() else 0


@dataclass(frozen=True)
class Log:
    """One log file of a cluster."""

    node: str | None  # None: the supervisor's
    source: str  # "daemon", "nic", a program's name
    path: Path


def counters(cluster: str, node: int) -> dict[str, int]:
    """A node's counters by name, programs that are gone included."""
    return {name: value for name, _, value in counters_explained(cluster, node)}


def counters_explained(cluster: str, node: int) -> list[tuple[str, str, int]]:
    """Name, meaning and value of each counter of a node."""
    found = ffi.new("struct vmmc_counter[]", _COUNTERS_MOST)
    count = lib.vmmc_node_counters(cluster.encode(), node, found, _COUNTERS_MOST)
    if count < 0:
        raise _error(cluster, node)
    return [
        (ffi.string(each.name).decode(), ffi.string(each.meaning).decode(), int(each.value))
        for each in found[0:count]
    ]


def link_counters(cluster: str, sender: int, receiver: int) -> dict[str, int]:
    """What the wire from one node to another did, and what the link over it had to do, by name."""
    return {name: value for name, _, value in link_counters_explained(cluster, sender, receiver)}


def link_counters_explained(cluster: str, sender: int, receiver: int) -> list[tuple[str, str, int]]:
    """Name, meaning and value of each of these counters; all 0 while the two nodes have not talked."""
    found = ffi.new("struct vmmc_counter[]", _COUNTERS_MOST)
    count = lib.vmmc_link_counters(cluster.encode(), sender, receiver, found, _COUNTERS_MOST)
    if count < 0:
        raise _error(cluster, sender)
    return [
        (ffi.string(each.name).decode(), ffi.string(each.meaning).decode(), int(each.value))
        for each in found[0:count]
    ]


def _error(cluster: str, node: int) -> OSError:
    return OSError(
        ffi.errno, f"{node_name(node)} of cluster '{cluster}' cannot be looked at: {os.strerror(ffi.errno)}"
    )


def sockets(cluster: str, node: int) -> list[Socket]:
    """Every VMMC socket of a node's programs."""
    most = 64
    while True:
        found = ffi.new("struct vmmc_socket_info[]", most)
        count = lib.vmmc_sockets(cluster.encode(), node, found, most)
        if count < 0:
            raise _error(cluster, node)
        if count <= most:
            break
        most = count + count // 4  # more may come while we look again
    return [
        Socket(
            node=node_name(node),
            state=_text(each.state),
            local=_text(each.local),
            peer=_text(each.peer),
            receive_queue=int(each.receive_queue),
            send_queue=int(each.send_queue),
            received=int(each.received),
            sent=int(each.sent),
            pid=int(each.pid),
            command=_text(each.command),
        )
        for each in found[0:count]
    ]


def _text(characters: Any) -> str:
    return str(ffi.string(characters).decode("utf-8", "replace"))


def programs(place: ClusterPaths, nodes: int, *, with_sockets: bool = False) -> list[dict[str, Any]]:
    """Every program on every node, as `vmmc-emu ps --json` prints it."""
    by_pid: dict[int, list[Socket]] = {}
    if with_sockets:
        for node in range(nodes):
            for each in sockets(place.cluster, node):
                by_pid.setdefault(each.pid, []).append(each)
    found = []
    for process in processes.programs(place):
        try:
            running = psutil.Process(process.pid)
            with running.oneshot():
                times = running.cpu_times()
                entry = {
                    "node": node_name(process.node or 0),
                    "pid": process.pid,
                    "command": processes.command_of(process.pid) or process.command,
                    "memory_bytes": running.memory_info().rss,
                    "cpu_s": round(times.user + times.system, 2),
                    "cpu_percent": _cpu_percent(running, times.user + times.system),
                    "started": running.create_time(),
                }
        except psutil.Error:
            continue  # ended while we looked
        if with_sockets:
            entry["sockets"] = [_as_json(each) for each in by_pid.pop(process.pid, [])]
        found.append(entry)
    return found


def _cpu_percent(process: psutil.Process, used_s: float) -> float:
    """Of one core, over the process's life, as ps counts."""
    lived_s = max(time.time() - process.create_time(), 0.01)
    return round(100 * used_s / lived_s, 1)


def _as_json(each: Socket) -> dict[str, Any]:
    return {key: value for key, value in each.__dict__.items() if key not in {"node", "pid", "command"}}


def logs(place: ClusterPaths, nodes: set[int] | None = None) -> list[Log]:
    """The log files: the supervisor's (unless nodes are named), then each node's: daemon, NIC, programs."""
    found: list[tuple[int, int, Log]] = []
    for path in place.logs.glob("*.log"):
        owner, dot, source = path.name.removesuffix(".log").partition(".")
        if not dot:
            if nodes is None:
                found.append((-1, 0, Log(None, owner, path)))
            continue
        digits = owner.removeprefix("node")
        if digits.isdigit() and (nodes is None or int(digits) in nodes):
            rank = {"daemon": 0, "nic": 1}.get(source, 2)
            found.append((int(digits), rank, Log(owner, source, path)))
    return [log for _, _, log in sorted(found, key=lambda item: (item[0], item[1], item[2].path))]


_LEVELS = ("info", "warning", "error")


def log_prefix(log: Log) -> str:
    """Whose lines they are."""
    return f"{log.node} {log.source}" if log.node else log.source


def is_wanted(log: Log, line: str, level: str) -> bool:
    """True for lines of that level and above, and for all that have none: programs', and backtraces."""
    if level == _LEVELS[0] or log.source not in {"supervisor", "daemon", "nic"}:
        return True
    words = line.split(" ", 2)
    return len(words) < 2 or words[1] not in _LEVELS[: _LEVELS.index(level)]


def log_lines(log: Log, level: str = "info") -> Iterator[str]:
    """A log's lines of that level and above, each with whose it is in front."""
    try:
        file = open(log.path, encoding="utf-8", errors="replace")  # noqa: SIM115  closed below
    except FileNotFoundError:
        return  # the cluster went down while we looked
    with file:
        for line in file:
            if is_wanted(log, line, level):
                yield f"{log_prefix(log)} | {line.rstrip()}"
