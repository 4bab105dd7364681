"""Who runs in a cluster: records in the runtime directory, processes found by them, and how they end.

Every process of a cluster has a file in <runtime>/processes, made by whoever started it.  It says the
process id *and* when that process started, so a number that the kernel gave to somebody else since is
never taken for ours; signals go through a pidfd for the same reason.  What programs start themselves
is found by the environment that it inherits (VMMC_SOCKET) and by its parents.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vmmc_emu.names import segment_name
from vmmc_emu.paths import SHM, ClusterPaths, lock_in_the_way

SUPERVISOR, DAEMON, NIC, PROGRAM = "supervisor", "daemon", "nic", "program"
GRACE_S = 2.0  # between asking processes to end and forcing them

_RSEQ = "glibc.pthread.rseq"


def switch_fast(environment: MutableMapping[str, str]) -> None:
    """Makes changes to a process of this environment cheaper: glibc registers no restartable sequences.

    The kernel looks after those of a process at each return from another, and a message is a change of
    process (docs/performance.md has the figures).  Who says something about them keeps it.  Elsewhere than
    on x86-64 glibc needs them to tell a thread's core without a system call, which costs more.
    """
    if os.uname().machine != "x86_64":
        return
    tunables = [item for item in environment.get("GLIBC_TUNABLES", "").split(":") if item]
    if not any(item.partition("=")[0] == _RSEQ for item in tunables):
        environment["GLIBC_TUNABLES"] = ":".join([*tunables, f"{_RSEQ}=0"])


@dataclass(frozen=True)
class Process:
    """One process of a cluster."""

    pid: int
    start: int  # clock ticks between the machine's start and the process's: tells users of one pid apart
    kind: str
    node: int | None = None
    command: str = ""

    def is_alive(self) -> bool:
        """True while this very process runs (a zombie does not)."""
        return start_of(self.pid) == self.start

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it."""
        fields = _stat(self.pid)
        return fields is not None and fields[0] == b"T"


def _stat(pid: int) -> list[bytes] | None:
    """Fields 3 onward of /proc/<pid>/stat (field 2, the name, may hold anything)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def start_of(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; None: there is none, or a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in b"ZX" else int(fields[19])


def boot_id() -> str:
    """Tells one run of the machine from another: a runtime directory may outlive it."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def open_pidfd(process: Process) -> int | None:
    """A descriptor of exactly this process, or None: it is gone.  OSError: there is none to be had."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError as error:
        if error.errno in {errno.ESRCH, errno.EINVAL}:
            return None
        raise
    alive = False
    try:
        alive = process.is_alive()  # looked at after opening: the number cannot have changed hands since
    finally:
        if not alive:
            os.close(descriptor)
    return descriptor if alive else None


# ---- records ----


def _record_name(kind: str, node: int | None, pid: int) -> str:
    if kind == PROGRAM:
        return f"{kind}-{pid}"
    return kind if node is None else f"{kind}-{node}"


def record(
    paths: ClusterPaths, pid: int, kind: str, node: int | None = None, command: str = ""
) -> Process | None:
    """Writes down that `pid` belongs to the cluster.  None: it is gone already, or there is no room.

    What could not be written down is found at the end by its locks (`lock_holders`, `nic_of`).
    """
    start = start_of(pid)
    if start is None:
        return None
    process = Process(pid, start, kind, node, command)
    path = paths.processes / _record_name(kind, node, pid)
    return process if _write(path, asdict(process)) else None


def _write(path: Path, content: Any) -> bool:
    """Replaces a file by JSON, so that readers see all of it or what was there; False: no room."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(content), encoding="utf-8")
        draft.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        return False
    return True


def forget(paths: ClusterPaths, kind: str, node: int | None, pid: int) -> None:
    """Removes a record; it may be gone."""
    (paths.processes / _record_name(kind, node, pid)).unlink(missing_ok=True)


def recorded(paths: ClusterPaths, *kinds: str) -> list[Process]:
    """The recorded processes that still run, of these kinds (all when none is named)."""
    try:
        names = os.listdir(paths.processes)
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        kind = name.partition("-")[0]
        if name.startswith(".") or (kinds and kind not in kinds):
            continue
        try:
            process = Process(**json.loads((paths.processes / name).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            continue  # removed meanwhile, or no record of ours
        if process.is_alive():
            found.append(process)
        elif kind == PROGRAM:
            # its starter was killed before it could tidy up
            (paths.processes / name).unlink(missing_ok=True)
    return sorted(found, key=lambda process: (process.node or 0, process.pid))


def programs(paths: ClusterPaths) -> list[Process]:
    """Every program that runs on a node: started by us, inherited from such a one, or attached."""
    known = {process.pid: process for process in recorded(paths)}
    found = {pid: process for pid, process in known.items() if process.kind == PROGRAM}
    marker = b"\0VMMC_SOCKET=" + os.fsencode(paths.runtime) + b"/node"
    children: dict[int, list[int]] = {}
    starts: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        fields = _stat(pid)
        if fields is None or fields[0] in b"ZX":
            continue
        starts[pid] = int(fields[19])
        children.setdefault(int(fields[1]), []).append(pid)
        if pid in known:
            continue
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = b"\0" + file.read()
        except OSError:
            continue  # another user's, or gone
        node, dot, _ = environment.partition(marker)[2].partition(b".sock")
        if dot and node.isdigit():
            found[pid] = Process(pid, starts[pid], PROGRAM, int(node), command_of(pid))
    # Programs may overwrite their environment (redis and nginx do, to set titles): follow parents too.
    waiting = list(found.values())
    while waiting:
        parent = waiting.pop()
        for pid in children.get(parent.pid, ()):
            if pid not in found and pid not in known:
                found[pid] = Process(pid, starts[pid], PROGRAM, parent.node, command_of(pid))
                waiting.append(found[pid])
    found.pop(os.getpid(), None)  # `vmmc-emu ps` typed in a shell on a node
    return sorted(found.values(), key=lambda process: (process.node or 0, process.pid))


def command_of(pid: int) -> str:
    """The command line of a process as one line, or its name in brackets when it has none."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().rstrip(b"\0").split(b"\0")
        if any(words):
            return " ".join(" ".join(os.fsdecode(word) for word in words).split())
        with open(f"/proc/{pid}/comm", "rb") as file:
            return f"[{os.fsdecode(file.read().strip())}]"
    except OSError:
        return ""


# ---- found by what they hold ----


def lock_holders(path: Path) -> list[Process]:
    """Processes of ours, but this one, that hold a lock of this file through an open file description."""
    found = []
    try:
        wanted = os.stat(path)
    except FileNotFoundError:
        return []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for descriptor in os.listdir(f"/proc/{entry}/fd"):
                held = f"/proc/{entry}/fd/{descriptor}"
                if os.readlink(held) != os.fspath(path) or not os.path.samestat(os.stat(held), wanted):
                    continue
                with open(f"/proc/{entry}/fdinfo/{descriptor}", encoding="ascii") as file:
                    holds = "OFDLCK" in file.read()  # others may have it open to ask whether it is held
                if holds and (start := start_of(int(entry))) is not None:
                    found.append(Process(int(entry), start, DAEMON))
                    break
    return found


def nic_of(paths: ClusterPaths, node: int) -> Process | None:
    """The process that serves a node as its NIC, recorded or not: it holds a lock of the node's state."""
    name = SHM / segment_name(paths.cluster, node, "state").removeprefix("/")
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return nic_that_holds(descriptor, node)
    finally:
        os.close(descriptor)


def nic_that_holds(descriptor: int, node: int) -> Process | None:
    """The same by a descriptor, open for writing, of the node's state, which may have been unlinked."""
    locked, pid = lock_in_the_way(descriptor, fcntl.F_GETLK)
    start = start_of(pid) if locked and pid > 0 else None
    return None if start is None else Process(pid, start, NIC, node)


# ---- successors ----

_REMEMBERED = 10


def note_restart(paths: ClusterPaths, what: str, pid: int, how: str) -> None:
    """Writes down, for `status`, that a process (node3.nic, node3.daemon, supervisor) gets a successor."""
    path = paths.restarts / f"{what}.json"
    known = restarts(paths, what)
    recent = [{"pid": pid, "how": how, "when": time.time()}, *known["recent"]]
    _write(path, {"count": known["count"] + 1, "recent": recent[:_REMEMBERED]})


def restarts(paths: ClusterPaths, what: str) -> dict[str, Any]:
    """How often a process was replaced (`count`), and the last times (`recent`): pid, how, when."""
    try:
        found = json.loads((paths.restarts / f"{what}.json").read_text(encoding="utf-8"))
        return {"count": int(found["count"]), "recent": list(found["recent"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"count": 0, "recent": []}


# ---- ending ----


def end(processes: Iterable[Process], grace_s: float = GRACE_S) -> list[Process]:
    """Asks processes to end (SIGTERM), forces what is left after a grace (SIGKILL) and returns that."""
    forced: list[Process] = []
    for waiting in _held(processes):
        poll = select.poll()
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
            _send(descriptor, signal.SIGTERM)
            _send(descriptor, signal.SIGCONT)  # one that is stopped could not hear it
        _wait_for_exits(poll, waiting, grace_s)
        forced += waiting.values()
        for descriptor in waiting:
            _send(descriptor, signal.SIGKILL)
        _wait_for_exits(poll, waiting, 10.0)
    return forced


def kill(processes: Iterable[Process]) -> None:
    """Ends processes by SIGKILL, as a loss of power does, and returns when they are gone."""
    for waiting in _held(processes):
        poll = select.poll()
        for descriptor in waiting:
            _send(descriptor, signal.SIGKILL)
            poll.register(descriptor, select.POLLIN)
        _wait_for_exits(poll, waiting, 10.0)


def _held(processes: Iterable[Process]) -> Iterator[dict[int, Process]]:
    """Those of them that live, but not this one, by a descriptor each: at once, or as many as there may be.

    What is left in the dictionary is in uninterruptible sleep, perhaps: nothing more can be done from here.
    """
    waiting: dict[int, Process] = {}
    try:
        for process in processes:
            if process.pid == os.getpid():
                continue
            try:
                descriptor = open_pidfd(process)
            except OSError:
                if not waiting:
                    raise
                yield waiting
                _close(waiting)
                descriptor = open_pidfd(process)
            if descriptor is not None:
                waiting[descriptor] = process
        if waiting:
            yield waiting
    finally:
        _close(waiting)


def _close(waiting: dict[int, Process]) -> None:
    for descriptor in waiting:
        os.close(descriptor)
    waiting.clear()


def _send(descriptor: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        signal.pidfd_send_signal(descriptor, number)


def _wait_for_exits(poll: select.poll, waiting: dict[int, Process], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while waiting and (left := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left * 1000):
            poll.unregister(descriptor)
            del waiting[descriptor]
            os.close(descriptor)
