"""How a cluster starts and ends.

`start` spawns the supervisor and waits for its word; the supervisor (vmmc_emu.nodes.supervisor) does
the rest, so that nothing half-started stays behind when the one who asked is interrupted.  `teardown`
removes everything that a cluster can leave: the supervisor calls it when it is told to end, and `stop`
once more for what a killed supervisor left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import socket
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmmc_emu import limits, paths, power, processes
from vmmc_emu.errors import ClusterError
from vmmc_emu.names import check_node_count, node_address, node_address6, node_name, segment_prefix
from vmmc_emu.paths import ClusterPaths

if TYPE_CHECKING:
    from vmmc_emu.wires import Change

_PLACE = ("VMMC_CLUSTER", "VMMC_NODE", "VMMC_NODES", "VMMC_SOCKET", "VMMC_PLACED")  # programs.environment

START_TIMEOUT_S = 120.0
_LETTING_GO_S = 2.0  # for which a lock may outlast the last process of whose records it is


@dataclass(frozen=True)
class Description:
    """What cluster.json says."""

    cluster: str
    nodes: int
    started: float  # seconds since the epoch
    boot: str
    owner: int | None  # the process that the cluster ends with
    owner_start: int | None = None  # in clock ticks, as processes.start_of says

    def as_json(self) -> str:
        """The text of cluster.json."""
        return json.dumps(self.__dict__)


def describe(place: ClusterPaths) -> Description:
    """Reads cluster.json; ClusterError when the cluster is not up."""
    try:
        description = Description(**json.loads(place.description.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise ClusterError(f"cluster '{place.cluster}' is not up: {_how_to_start(place.cluster)}") from None
    except (ValueError, TypeError):
        raise ClusterError(
            f"{place.description} cannot be understood: {_command(place.cluster)} down removes what is left"
        ) from None
    return description


def describe_running(place: ClusterPaths) -> Description:
    """The same, for those who want to use it: what is left of a killed cluster is not up either."""
    description = describe(place)
    if not is_managed(place):
        raise ClusterError(
            f"cluster '{place.cluster}' is not up, its supervisor and daemons were killed:"
            f" {_how_to_start(place.cluster)}, which removes what is left"
        )
    return description


def is_managed(place: ClusterPaths) -> bool:
    """Whether a supervisor or a daemon lives: by their lock, or, should that be removed, by their records."""
    return paths.lock_is_held(place) or bool(_managers(place))


def _managers(place: ClusterPaths) -> list[processes.Process]:
    return processes.recorded(place, processes.SUPERVISOR, processes.DAEMON)


def _command(cluster: str) -> str:
    return "vmmc-emu" if cluster == "default" else f"vmmc-emu --cluster {cluster}"


def _how_to_start(cluster: str) -> str:
    return f"start it with `{_command(cluster)} up`"


# ---- starting ----


def start(place: ClusterPaths, nodes: int, *, owned: bool = False, profile: str | None = None) -> int:
    """Starts a cluster and returns its supervisor's pid when every node is ready.

    owned: it ends when this process does, however this process ends.  profile: see `links.profile`.
    """
    check_node_count(nodes)
    changes = [] if profile is None else _changes_of(profile, nodes)
    if not _name_is_free(place):
        raise ClusterError(already_up(place))
    paths.check_socket_paths(place, nodes)
    limits.check_room(nodes)
    paths.make_private_directory(place.runtime.parent)
    report, theirs = os.pipe()
    try:
        pid = os.posix_spawn(
            sys.executable,
            [
                *(sys.executable, "-P", "-m", "vmmc_emu.nodes.supervisor"),
                *(place.cluster, str(nodes), str(place.runtime), str(os.getpid() if owned else 0)),
            ],
            _supervisor_environment(),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, theirs, 1),
                (os.POSIX_SPAWN_DUP2, theirs, 2),
            ],
            setpgroup=0,  # not a session: see "Scheduling" in docs/architecture.md
            setsigmask=(),
        )
    except OSError as error:
        os.close(report)
        raise ClusterError(f"cannot start {sys.executable}: {error.strerror}") from None
    finally:
        os.close(theirs)
    # Should this process be interrupted here, closing the pipe tells the supervisor to undo everything.
    with open(report, "rb") as file:
        answer = _read_answer(file.fileno())
    if answer.get("ready"):
        try:
            if changes:
                _change_wires(place, changes, profile)
        except BaseException:  # also an interruption: whoever asked has no cluster that they could end
            stop(place)
            _reap(pid)
            raise
        return pid
    _reap(pid)
    raise ClusterError(answer["error"])


def _name_is_free(place: ClusterPaths) -> bool:
    """Whether no cluster has this name.  Processes that were killed a moment ago may still be letting go."""
    deadline = time.monotonic() + _LETTING_GO_S
    while not _managers(place):
        if not paths.lock_is_held(place):
            return True
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return False


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _changes_of(profile: str, nodes: int) -> list[Change]:
    from vmmc_emu import links  # noqa: PLC0415  most clusters need none of it

    return links.profile(profile).changes(nodes)


def _change_wires(place: ClusterPaths, changes: list[Change], profile: str | None) -> None:
    from vmmc_emu import wires  # noqa: PLC0415

    try:
        wires.change(place, changes)
    except ClusterError as error:  # each can be, and not all of them together
        raise ClusterError(f"profile {profile}: {error}") from None


def already_up(place: ClusterPaths) -> str:
    """Says that the name is taken, where, and what can be done."""
    elsewhere = paths.recorded_runtime(place.cluster)
    where = f", with its files in {elsewhere}" if elsewhere and elsewhere != place.runtime else ""
    return (
        f"cluster '{place.cluster}' is already up{where}: `{_command(place.cluster)} status` shows it,"
        f" `{_command(place.cluster)} down` ends it; another one needs another --cluster NAME"
    )


def _supervisor_environment() -> dict[str, str]:
    """Ours, without what would make it a program on some node, and with the way to this package."""
    environment = {name: value for name, value in os.environ.items() if name not in _PLACE}
    ours = str(paths.native_directory() / "libvmmc-preload.so")
    preload = [item for item in environment.pop("LD_PRELOAD", "").replace(":", " ").split() if item != ours]
    if preload:
        environment["LD_PRELOAD"] = " ".join(preload)
    package_root = str(Path(__file__).absolute().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package_root, environment.get("PYTHONPATH"))))
    processes.switch_fast(environment)
    return environment


def _read_answer(descriptor: int) -> dict[str, Any]:
    """What the supervisor says: one line of JSON; anything else is how it died."""
    text = b""
    deadline = time.monotonic() + START_TIMEOUT_S
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while b"\n}\n" not in text:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return {
                "error": f"the cluster was not ready after {START_TIMEOUT_S:.0f} s:"
                " the machine may be overloaded"
            }
        chunk = os.read(descriptor, 65536)
        if not chunk:
            break
        text += chunk
    complaint, _, answer = text.decode(errors="replace").rpartition("{\n")
    try:
        result: dict[str, Any] = json.loads("{" + answer)
    except ValueError:
        lines = (complaint + answer).strip().splitlines()
        return {
            "error": f"the supervisor ended before it was ready: {lines[-1] if lines else 'it said nothing'}"
        }
    return result


def answer(**fields: Any) -> bytes:
    """The supervisor's side of it."""
    return b"{\n" + json.dumps(fields).encode()[1:-1] + b"\n}\n"


# ---- nodes ----

SUPERVISOR_TIMEOUT_S = 10.0  # in which one that was killed has a successor

# A request that is larger than this goes in a file, as a socket's message has to fit its buffer; and one that
# is larger than that does not go at all.  A partition of 1024 nodes into as many groups has 6 MB.
ENCLOSED_BYTES = 32 << 10
REQUEST_BYTES_MOST = 32 << 20


def is_off(place: ClusterPaths, node: int) -> str:
    """Says that a node is off, and what can be done."""
    return f"{node_name(node)} is off: start it with `{_command(place.cluster)} node start {node}`"


def ask_supervisor(
    place: ClusterPaths,
    message: dict[str, Any],
    descriptors: Sequence[int] = (),
    *,
    repeatable: bool = False,
) -> dict[str, Any]:
    """Sends a request to a cluster's supervisor and returns its answer; ClusterError: there is none.

    While a supervisor that was killed has no successor yet, it waits for that.  repeatable: that one is asked
    again when the first was killed before it answered.
    """
    data = json.dumps(message).encode()
    if len(data) <= ENCLOSED_BYTES:
        return _ask_supervisor(place, data, descriptors, repeatable)
    if len(data) > REQUEST_BYTES_MOST:
        raise ClusterError(
            f"the request has {limits.mebibytes(len(data))}, and"
            f" {limits.mebibytes(REQUEST_BYTES_MOST)} is the most that one can have: ask in parts"
        )
    with os.fdopen(os.memfd_create("request"), "wb") as file:
        file.write(data)
        file.flush()
        return _ask_supervisor(place, b'{"enclosed": true}', [file.fileno(), *descriptors], repeatable)


def _ask_supervisor(
    place: ClusterPaths, data: bytes, descriptors: Sequence[int], repeatable: bool
) -> dict[str, Any]:
    deadline = time.monotonic() + SUPERVISOR_TIMEOUT_S
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(SUPERVISOR_TIMEOUT_S)
            try:
                connection.connect(os.fspath(place.control))
                socket.send_fds(connection, [data], descriptors)
                answer = _await_answer(place, connection)
                if answer or not repeatable or time.monotonic() > deadline:
                    break
            except TimeoutError:
                raise ClusterError(_is_stopped(place, connection) or _no_supervisor(place)) from None
            except OSError:
                # Nobody listens, or who did was killed before it had read the request: then the connection is
                # reset.  After that it would end.
                if not is_managed(place) or time.monotonic() > deadline:
                    raise ClusterError(_no_supervisor(place)) from None
                time.sleep(0.02)
    if not answer:
        raise ClusterError(
            f"the supervisor of cluster '{place.cluster}' ended before it answered: {_unknown(place)}"
        )
    result: dict[str, Any] = json.loads(answer)
    return result


def _await_answer(place: ClusterPaths, connection: socket.socket) -> bytes:
    """What the supervisor answers, which may take it long; but not one that is stopped."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return connection.recv(65536)
        except TimeoutError:
            if _is_stopped(place, connection) or time.monotonic() > deadline:
                raise


def _is_stopped(place: ClusterPaths, connection: socket.socket) -> str | None:
    for supervisor in processes.recorded(place, processes.SUPERVISOR):
        if not supervisor.is_stopped():
            continue
        unread = fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)) != bytes(4)
        done = "nothing was done" if unread else _unknown(place)
        return (
            f"the supervisor of cluster '{place.cluster}' is stopped and does not answer; {done}:"
            f" `kill -CONT {supervisor.pid}` lets it go on"
        )
    return None


def _unknown(place: ClusterPaths) -> str:
    return f"whether it did what was asked, `{_command(place.cluster)} status` and `ps` show"


def _no_supervisor(place: ClusterPaths) -> str:
    return (
        f"cluster '{place.cluster}' has no supervisor that answers: programs can run in the foreground only,"
        " until the cluster is started anew (down, up)"
    )


def power_node(place: ClusterPaths, node: int, *, on: bool) -> None:
    """Takes the power from a node, or gives it back, and returns when that is done."""
    describe_running(place)
    answer = ask_supervisor(place, {"what": "start" if on else "kill", "node": node})
    if "message" in answer:
        raise ClusterError(answer["message"])


# ---- ending ----


def stop(place: ClusterPaths, grace_s: float = processes.GRACE_S) -> bool:
    """Ends a cluster and removes every trace of it.  False: there was none."""
    traces = (
        place.runtime.exists() or bool(place.segments()) or paths.recorded_runtime(place.cluster) is not None
    )
    _say_ending(place)
    supervisors = processes.recorded(place, processes.SUPERVISOR)
    for supervisor in supervisors:
        # It ends programs first, which may take their grace, and then its own.
        processes.end([supervisor], grace_s=3 * grace_s + 20)
    if not traces:
        return False
    teardown(place, grace_s)
    return True


def teardown(place: ClusterPaths, grace_s: float = processes.GRACE_S) -> None:
    """Ends every process of a cluster but this one, removes its segments and files, and frees its name."""
    end_processes(place, grace_s)
    lock = paths.take_lock(place)
    if lock is None:
        if processes.recorded(place, processes.SUPERVISOR):
            return  # somebody has started it anew meanwhile: theirs
        raise ClusterError(
            f"cluster '{place.cluster}' is held by a process that is not recorded in {place.runtime}:"
            f" `fuser -v {paths.lock_path(place.cluster)}` names it"
        )
    remove_files(place)
    paths.release_lock(place, lock)


def _say_ending(place: ClusterPaths) -> None:
    """Lets nobody bring anybody back; without room for that, those who do are found again."""
    with contextlib.suppress(OSError):
        if place.runtime.exists():
            place.ending.touch()


def end_processes(place: ClusterPaths, grace_s: float = processes.GRACE_S) -> None:
    """Ends every process of a cluster but this one: programs first."""
    _say_ending(place)
    for _ in range(5):  # a program that is asked to end may still start another
        found = processes.programs(place)
        if not found:
            break
        processes.end(found, grace_s)
    # Who would bring the others back goes first.
    for _ in range(5):
        for kind in (processes.SUPERVISOR, processes.DAEMON, processes.NIC):
            processes.end(processes.recorded(place, kind), grace_s)
        # Those whose makers were killed before they could write them down.
        processes.end(processes.lock_holders(paths.lock_path(place.cluster)), grace_s)
        processes.end(_nics(place), grace_s)
        left = (processes.SUPERVISOR, processes.DAEMON, processes.NIC)
        if all(each.pid == os.getpid() for each in processes.recorded(place, *left)):
            return


def _nics(place: ClusterPaths) -> list[processes.Process]:
    """The NICs of a cluster's nodes, by their locks."""
    return [nic for node in _states(place) if (nic := processes.nic_of(place, node))]


def _states(place: ClusterPaths) -> dict[int, Path]:
    """The segments that hold what NICs remember, by their nodes."""
    found = {}
    for name in place.segments():
        node, dot, what = name.removeprefix(segment_prefix(place.cluster)).partition(".")
        digits = node.removeprefix("node")
        if dot and what == "state" and digits.isdigit():
            found[int(digits)] = paths.SHM / name
    return found


def remove_files(place: ClusterPaths) -> None:
    """Removes a cluster's segments and its runtime directory; the lock stays."""
    remove_segments(place)
    shutil.rmtree(place.runtime, ignore_errors=True)


def remove_segments(place: ClusterPaths, node: int | None = None) -> None:
    """Unlinks what is exactly this cluster's, or one node's, in /dev/shm, except the cluster's lock.

    NICs that only begin, whose daemons were killed before they could write them down, end with it.
    """
    for each, path in _states(place).items():
        if node is None or each == node:
            _remove_state(each, path)
    prefix = segment_prefix(place.cluster) + ("" if node is None else f"{node_name(node)}.")
    why = "the cluster is down" if node is None else "the node has lost its power"
    for name in place.segments():
        if not name.startswith(prefix):
            continue
        if name.endswith(".nic"):  # a visitor may wait there, which does not end with its node
            _tell("vmmc_tell_gone", paths.SHM / name, why.encode())
        elif name.endswith(".pub") and node is not None:  # peers' NICs answer connects by it
            _tell("vmmc_tell_off", paths.SHM / name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(paths.SHM / name)


def _remove_state(node: int, path: Path) -> None:
    """Unlinks what a NIC remembers, and ends the one that holds it; a later one finds it gone, and ends."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        with contextlib.suppress(FileNotFoundError):  # somebody else ends it, too
            os.unlink(path)
        # In this order: a NIC takes its lock first and then looks whether the segment has a name still.
        if nic := processes.nic_that_holds(descriptor, node):
            processes.kill([nic])
    finally:
        os.close(descriptor)


def _tell(call: str, segment: Path, *arguments: bytes) -> None:
    """Writes into a segment whose NIC is gone what others that have it mapped are to find."""
    import ctypes  # noqa: PLC0415  mostly there is nobody

    with contextlib.suppress(OSError, ClusterError):
        function = ctypes.CDLL(os.fspath(paths.native_file("libvmmc.so")))[call]
        function.argtypes = [ctypes.c_char_p] * (1 + len(arguments))
        function(os.fsencode(segment), *arguments)


# ---- looking ----


def status(place: ClusterPaths) -> dict[str, Any]:
    """The cluster as `vmmc-emu status --json` prints it."""
    description = describe(place)
    off = {node for node, given in power.ever_off(place).items() if not given.on}
    found = processes.recorded(place, processes.SUPERVISOR, processes.DAEMON, processes.NIC)
    stopped = sorted(process.pid for process in found if process.is_stopped())
    daemons = {process.node: process.pid for process in found if process.kind == processes.DAEMON}
    nics = {process.node: process.pid for process in found if process.kind == processes.NIC}
    supervisor = next((process.pid for process in found if process.kind == processes.SUPERVISOR), None)
    nodes = []
    for node in range(description.nodes):
        daemon, nic = daemons.get(node), nics.get(node)
        state = "up" if daemon and nic else "no daemon" if nic else "no NIC" if daemon else "down"
        if state == "up" and not {daemon, nic}.isdisjoint(stopped):
            state = "stopped"
        if node in off:
            state = "off"
        restarts = {
            what: processes.restarts(place, f"{node_name(node)}.{what}")
            for what in (processes.DAEMON, processes.NIC)
        }
        nodes.append(
            {
                "name": node_name(node),
                "address": node_address(node),
                "address6": node_address6(node),
                "daemon_pid": daemon,
                "nic_pid": nic,
                "state": state,
                "restarts": restarts,
            }
        )
    states = {entry["state"] for entry in nodes} - {"off"} or {"up"}
    if supervisor is None:
        state = "down" if states == {"down"} else "unsupervised" if daemons else "abandoned"
    else:
        state = "up" if states == {"up"} and supervisor not in stopped else "degraded"
    return {
        "cluster": place.cluster,
        "state": state,
        "supervisor_pid": supervisor,
        "supervisor_restarts": processes.restarts(place, processes.SUPERVISOR),
        "uptime_s": round(max(0.0, time.time() - description.started), 1),
        "runtime": str(place.runtime),
        "stopped_pids": stopped,
        "nodes": nodes,
    }


def lost_nodes(place: ClusterPaths, found: dict[str, Any]) -> list[int]:
    """Nodes of a status that get no daemon any more: it and the supervisor died together.

    Nobody holds such a node's socket; that of one whose daemon has a successor soon the supervisor has.
    """
    if found["supervisor_pid"] is None:
        return []
    return [
        node
        for node, entry in enumerate(found["nodes"])
        if entry["daemon_pid"] is None and entry["state"] != "off" and not _is_held(place.socket(node))
    ]


def _is_held(path: Path) -> bool:
    """Whether somebody has the socket of that path: asked by one of another type, they hear nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return False
        except OSError:  # EPROTOTYPE
            return True
    return True
