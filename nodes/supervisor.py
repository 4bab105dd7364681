"""The supervisor of a cluster: the warmed parent that forks a daemon a node, and forks it again when it dies.

    python -m vmmc_emu.nodes.supervisor CLUSTER NODES RUNTIME OWNER

It holds what must outlive a daemon (the attach sockets, wake descriptors and both ends of the socket
pair with the NIC), starts detached programs, and takes the cluster down when it is told to (SIGTERM) or
when its owner, the process of that pid, is gone (0: nobody owns it).

Standard output is a pipe to whoever asked for the cluster; it hears one answer (see lifecycle.answer).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmmc_emu.nodes import channel
from vmmc_emu.nodes.channel import Endpoint, Store
from vmmc_emu.nodes.daemon import become_daemon, describe_exit, log
from vmmc_emu.nodes.messages import Protocol, become_subreaper, segment_sizes
from vmmc_emu.nodes.title import set_title

from vmmc_emu import lifecycle, names, paths, processes, wires
from vmmc_emu.errors import ClusterError
from vmmc_emu.loop import Loop
from vmmc_emu.wires import Change, Wire

_START_TIMEOUT_S = 60.0
_DAEMON_YOUNG_S = 1.0
_DAEMON_BACKOFF_S = (0.05, 0.2, 1.0, 5.0)


@dataclass
class Node:
    """What the supervisor knows of one node."""

    store: Store
    daemon_pid: int = 0
    channel: socket.socket | None = None
    ready: bool = False
    started: float = 0.0
    failures: int = 0  # daemons that died young, in a row


class Supervisor:
    """One cluster's supervisor."""

    def __init__(self, place: paths.ClusterPaths, nodes: int, owner: int, lock: int) -> None:
        self._place, self._count, self._owner = place, nodes, owner
        self._lock = lock  # daemons hold it too, so that the name stays taken while one of them lives
        self._protocol = Protocol()
        self._sizes = segment_sizes()
        self._loop = Loop()
        self._nodes: list[Node] = []
        self._by_pid: dict[int, Node] = {}
        self._programs: dict[int, tuple[subprocess.Popen[bytes], int]] = {}  # detached: by pid, with the node
        self._failure: str | None = None
        self._up = False
        self._began = time.monotonic()

    # ---- life ----

    def run(self) -> str | None:
        """Starts everything and serves until told to end.  Returns why it could not start, or None."""
        self._loop.on_signal(signal.SIGTERM, self._loop.stop)
        self._loop.on_signal(signal.SIGCHLD, self._reap)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._watch_owner()
        control = self._listen(self._place.control)
        os.set_blocking(control, False)
        for node in range(self._count):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener = self._listen(self._place.socket(node))
            self._nodes.append(Node(Store(node, listener, ours.detach(), theirs.detach())))
        # From here on, what the children share with us is not looked at by their garbage collectors.
        gc.collect()
        gc.freeze()
        for each in self._nodes:
            self._fork_daemon(each)
        self._loop.watch(control, lambda: self._accept_control(control))
        self._loop.call_later(_START_TIMEOUT_S, self._check_started)
        self._loop.run()
        return self._failure

    def _listen(self, path: Path) -> int:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(os.fspath(path))
        os.chmod(path, 0o600)
        listener.listen(1024)
        return listener.detach()

    def _watch_owner(self) -> None:
        if not self._owner:
            return
        descriptor = os.pidfd_open(self._owner)
        if os.getppid() != self._owner:  # it ended before we looked: the number may be another's
            raise ClusterError("the process that asked for the cluster is gone")
        self._loop.watch(descriptor, self._owner_ended)
        self._owner_pidfd = descriptor

    def _owner_ended(self) -> None:
        self._loop.unwatch(self._owner_pidfd)
        log(f"process {self._owner}, which this cluster belongs to, has ended: so does the cluster")
        self._loop.stop()

    def _check_started(self) -> None:
        if not self._up:
            waiting = [names.node_name(node.store.node) for node in self._nodes if not node.ready]
            shown = ", ".join(waiting[:5])
            self._fail(f"not ready after {_START_TIMEOUT_S:.0f} s: {shown}; the machine may be overloaded")

    def _fail(self, why: str) -> None:
        if not self._up and self._failure is None:
            self._failure = why
            self._loop.stop()

    def _node_ready(self, node: Node) -> None:
        node.ready = True
        if self._up or not all(each.ready for each in self._nodes):
            return
        self._up = True
        description = lifecycle.Description(
            self._place.cluster, self._count, time.time(), processes.boot_id(), self._owner or None
        )
        draft = self._place.description.with_suffix(".draft")
        draft.write_text(description.as_json(), encoding="utf-8")
        draft.rename(self._place.description)
        try:
            os.write(1, lifecycle.answer(ready=True))
        except BrokenPipeError:
            self._loop.stop()  # whoever asked was interrupted: undo it
            return
        output = os.open(
            self._place.logs / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        log(
            f"cluster '{self._place.cluster}' is up: {self._count} nodes"
            f" in {time.monotonic() - self._began:.3f} s"
        )

    # ---- daemons ----

    def _fork_daemon(self, node: Node) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        node.started = time.monotonic()
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            # Everything of other nodes is closed by number; the objects are never freed (os._exit).
            keep = sorted({0, 1, 2, self._lock, theirs.fileno(), *node.store.descriptors()})
            for low, high in zip(keep, [*keep[1:], 1 << 30], strict=True):
                os.closerange(low + 1, high)
            become_daemon(self._place, self._count, node.store, theirs, self._protocol, self._sizes)
        theirs.close()
        ours.setblocking(False)
        node.daemon_pid, node.channel = pid, ours
        self._by_pid[pid] = node
        name = names.node_name(node.store.node)
        processes.record(self._place, pid, processes.DAEMON, node.store.node, f"daemon of {name}")
        self._loop.watch(ours.fileno(), lambda: self._take_message(node))

    def _take_message(self, node: Node) -> None:
        self._hear_daemon(node)

    def _hear_daemon(self, node: Node) -> bool:
        """Takes one message; False: there is none."""
        if node.channel is None:
            return False
        try:
            received = channel.receive(node.channel)
        except BlockingIOError:
            return False
        if received is None:
            self._loop.unwatch(node.channel.fileno())
            node.channel.close()
            node.channel = None
            return False
        message, descriptors = received
        endpoints = node.store.endpoints
        match message["what"]:
            case "ready":
                self._node_ready(node)
            case "failed":
                self._fail(message["why"])
            case "nic":
                node.store.nic_pid = message["pid"]
            case "endpoint":
                serial = message["serial"]
                endpoints[serial] = Endpoint(
                    serial, message["index"], message["pid"], descriptors[0], descriptors[1]
                )
                node.store.last_serial = serial
            case "waker":
                endpoint = endpoints[message["serial"]]
                if message["number"] in endpoint.wakers:
                    os.close(endpoint.wakers[message["number"]])
                endpoint.wakers[message["number"]] = descriptors[0]
            case "replied":
                endpoints[message["serial"]].replied = True
            case "ending":
                endpoints[message["serial"]].ending = True
            case "gone":
                endpoints.pop(message["serial"]).close()
        return True

    def _daemon_ended(self, node: Node, how: str) -> None:
        while self._hear_daemon(node):  # its last words count: the successor starts from them
            pass
        if node.channel is not None:
            self._loop.unwatch(node.channel.fileno())
            node.channel.close()
            node.channel = None
        if not self._up:
            self._fail(f"the daemon of {names.node_name(node.store.node)} {how}")
            return
        young = time.monotonic() - node.started < _DAEMON_YOUNG_S
        node.failures = node.failures + 1 if young else 0
        delay = (
            _DAEMON_BACKOFF_S[min(node.failures - 1, len(_DAEMON_BACKOFF_S) - 1)] if node.failures else 0.0
        )
        log(
            f"{names.node_name(node.store.node)} daemon {node.daemon_pid} {how};"
            f" a successor starts {f'in {delay} s' if delay else 'now'}"
        )
        if delay:
            self._loop.call_later(delay, lambda: self._fork_daemon(node))
        else:
            self._fork_daemon(node)

    def _reap(self) -> None:
        """Every child that has ended: daemons, detached programs, NICs whose daemon died before them."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            pid = found.si_pid
            if pid in self._programs:
                program, at = self._programs.pop(pid)
                log(f"{names.node_name(at)} program {pid} {describe_exit(program.wait())}")
                processes.forget(self._place, processes.PROGRAM, at, pid)
                continue
            _, status = os.waitpid(pid, 0)
            if node := self._by_pid.pop(pid, None):
                self._daemon_ended(node, describe_exit(os.waitstatus_to_exitcode(status)))

    # ---- detached programs ----

    def _accept_control(self, control: int) -> None:
        with contextlib.suppress(BlockingIOError), socket.socket(fileno=os.dup(control)) as listener:
            connection, _ = listener.accept()
            connection.setblocking(False)
            self._loop.watch(connection.fileno(), lambda: self._hear_control(connection))

    def _hear_control(self, connection: socket.socket) -> None:
        try:
            received = channel.receive(connection)
        except BlockingIOError:
            return
        if received is None:
            self._loop.unwatch(connection.fileno())
            connection.close()
            return
        message, descriptors = received
        try:
            if "wires" in message:
                answer = self._change_wires([Change.from_json(each) for each in message["wires"]])
            else:
                answer = self._spawn(message["node"], *descriptors)
        except ClusterError as error:
            answer = {"errno": 0, "message": str(error), "filename": None}
        except OSError as error:
            answer = {"errno": error.errno, "message": error.strerror, "filename": error.filename}
        except (KeyError, TypeError, ValueError, subprocess.SubprocessError) as error:
            answer = {"errno": 0, "message": f"a request that is none: {error}", "filename": None}
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        channel.send(connection, **answer)

    # ---- wires ----

    def _change_wires(self, changes: list[Change]) -> dict[str, Any]:
        """Checks, records and passes on; nothing is changed when one of the changes cannot be."""
        changed: dict[int, dict[int, Wire]] = {}
        for change in changes:
            for sender, receiver in change.pairs(self._count):
                if receiver not in changed:
                    changed[receiver] = wires.read(self._place, receiver)
                before = Wire() if change.reset else changed[receiver].get(sender, Wire())
                changed[receiver][sender] = Wire.checked(before, change.settings)
        wires.write(self._place, changed)
        for receiver in changed:
            connection = self._nodes[receiver].channel
            # One that cannot be told now is busy with being told, or will read the file when it starts.
            if connection is not None:
                with contextlib.suppress(BlockingIOError):
                    channel.send(connection, what="wires")
        return {"wires": sum(len(leading) for leading in changed.values())}

    def _spawn(self, node: int, description: int, standard_input: int, output: int) -> dict[str, Any]:
        """Starts a program from its description: JSON in a file, as an environment may be large."""
        size = os.fstat(description).st_size
        wanted = json.loads(os.pread(description, size, 0))

        def limit() -> None:
            # Those of the shell in which it was asked for, not ours.
            for number, (soft, hard) in wanted["limits"]:
                highest = _lower(hard, resource.getrlimit(number)[1])
                resource.setrlimit(number, (_lower(soft, highest), highest))

        program = subprocess.Popen(
            wanted["arguments"], env=wanted["environment"], cwd=wanted["directory"], umask=wanted["umask"],
            stdin=standard_input, stdout=output, stderr=output, start_new_session=True, preexec_fn=limit,
        )  # fmt: skip
        self._programs[program.pid] = (program, node)
        command = " ".join(wanted["arguments"])
        processes.record(self._place, program.pid, processes.PROGRAM, node, command)
        log(f"{names.node_name(node)} program {program.pid} started: {command[:200]}")
        return {"pid": program.pid}


def main(cluster: str, nodes: int, runtime: str, owner: int) -> int:
    """Runs the supervisor of a cluster from start to end."""
    os.closerange(3, 1 << 30)
    os.chdir("/")
    os.umask(0o077)
    # Before the soft limit is raised it is what programs get that somebody detaches; see _spawn.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    place = paths.ClusterPaths(cluster, Path(runtime))
    previous = paths.recorded_runtime(cluster)
    lock = paths.take_lock(place)
    if lock is None:
        return refuse(lifecycle.already_up(place))
    try:
        # What a cluster of this name left whose processes were all killed.
        for old in {previous or place.runtime, place.runtime}:
            wreck = paths.ClusterPaths(cluster, old)
            if old.exists() or wreck.segments():
                lifecycle.end_processes(wreck)
                lifecycle.remove_files(wreck)
        for directory in (place.runtime, place.processes, place.logs, place.wires):
            paths.make_private_directory(directory)
        set_title(f"vmmc-emu: {cluster} supervisor", "vmmc supervisor")
        processes.record(place, os.getpid(), processes.SUPERVISOR, command="supervisor")
        become_subreaper()
        failure = Supervisor(place, nodes, owner, lock).run()
    except OSError as error:
        failure = str(error)
    lifecycle.end_processes(place)
    lifecycle.remove_files(place)
    paths.release_lock(place, lock)
    reap()
    return refuse(failure) if failure else 0


def reap() -> None:
    """Takes the exit statuses of all that has ended: not every machine's first process does it for us."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _lower(limit: int, other: int) -> int:
    """The lower of two resource limits, where "no limit" is not a number."""
    finite = [each for each in (limit, other) if each != resource.RLIM_INFINITY]
    return min(finite, default=resource.RLIM_INFINITY)


def refuse(why: str) -> int:
    """Tells whoever asked; they may be gone."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, lifecycle.answer(error=why))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
