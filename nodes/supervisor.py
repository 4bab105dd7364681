"""The supervisor of a cluster: the warmed parent that forks a daemon a node, and forks it again when it dies.

    python -m vmmc_emu.nodes.supervisor CLUSTER NODES RUNTIME OWNER [succeed]

It holds what must outlive a daemon (the attach sockets, wake descriptors and both ends of the socket
pair with the NIC), starts detached programs, takes power from nodes and gives it back, and takes the cluster
down when it is told to (SIGTERM) or when its owner, the process of that pid, is gone (0: nobody owns it).

Standard output is a pipe to whoever asked for the cluster; it hears one answer (see lifecycle.answer).

When it is killed, the first daemon to notice starts its successor (`succeed`), with the lock of the
cluster's name as descriptor 3 and that of supervision as 4.  Every daemon then joins and hands over copies
of what it has.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import termios
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vmmc_emu.nodes import channel, files, journal
from vmmc_emu.nodes.channel import Endpoint, Outbox, Store
from vmmc_emu.nodes.daemon import become_daemon, describe_exit, open_log, pause_before
from vmmc_emu.nodes.journal import ERROR, INFO, WARNING, log
from vmmc_emu.nodes.messages import Protocol, become_subreaper, segment_sizes
from vmmc_emu.nodes.title import set_title

from vmmc_emu import lifecycle, names, paths, power, processes, wires
from vmmc_emu.errors import ClusterError
from vmmc_emu.loop import Loop
from vmmc_emu.power import Power
from vmmc_emu.wires import Change, Wire

_START_TIMEOUT_S = 60.0
_DAEMON_YOUNG_S = 1.0
_DAEMON_BACKOFF_S = (0.05, 0.2, 1.0, 5.0)

_WIRED_S = 10.0  # in which one more daemon tells its NIC of a change of wires; who asked hears of the others

_MESSAGE_MOST = 2000  # characters of an error: what a socket's message certainly has room for

# More endpoints than a daemon can have attached of which no supervisor was told.
_SERIALS_UNKNOWN = 1 << 20


@dataclass
class Node:
    """What the supervisor knows of one node."""

    index: int
    store: Store | None = None  # None: it is off, or its daemon has yet to tell a new supervisor
    daemon_pid: int = 0
    channel: socket.socket | None = None
    outbox: Outbox | None = None  # of that channel
    ready: bool = False
    started: float = 0.0
    deaths: list[bool] = field(default_factory=list)  # of daemons that died young, in a row; True: by SIGKILL
    off: bool = False
    waiting: list[socket.socket] = field(default_factory=list)  # who asked for its start

    @property
    def name(self) -> str:
        """node3"""
        return names.node_name(self.index)


@dataclass
class Wiring:
    """A change of wires that is written down, and of which some daemons have yet to tell their NICs."""

    connection: socket.socket  # of whoever asked for it
    nodes: set[int]  # whose daemons those are,
    awaited: int  # and how many when that was last looked at
    answer: dict[str, Any]


class Supervisor:
    """One cluster's supervisor."""

    def __init__(self, place: paths.ClusterPaths, nodes: int, owner: int, lock: int) -> None:
        self._place, self._count, self._owner = place, nodes, owner
        self._lock = lock  # daemons hold it too, so that the name stays taken while one of them lives
        self._protocol = Protocol()
        self._sizes = segment_sizes()
        self._loop = Loop(self._failed)
        journal.begin(self._loop.call_later)
        self._nodes = [Node(index) for index in range(nodes)]
        self._by_pid: dict[int, Node] = {}
        self._programs: dict[int, tuple[subprocess.Popen[bytes], int]] = {}  # detached: by pid, with the node
        self._wirings: dict[int, Wiring] = {}  # by number: they are counted
        self._wirings_begun = 0
        self._failure: str | None = None
        self._up = False
        self._began = time.monotonic()

    # ---- life ----

    def run(self) -> str | None:
        """Starts everything and serves until told to end.  Returns why it could not start, or None."""
        self._prepare()
        if self._owner and os.getppid() != self._owner:  # it ended before we looked
            raise ClusterError("the process that asked for the cluster is gone")
        self._owner_start = processes.start_of(self._owner) if self._owner else None
        self._watch_owner()
        for node in self._nodes:
            node.store = self._new_store(node.index, Power())
        # From here on, what the children share with us is not looked at by their garbage collectors.
        gc.collect()
        gc.freeze()
        for node in self._nodes:
            self._fork_daemon(node)
        self._listen_control()
        self._loop.call_later(_START_TIMEOUT_S, self._check_started)
        self._loop.run()
        return self._failure

    def succeed(self) -> None:
        """Goes on where a supervisor was killed, until told to end."""
        self._prepare()
        self._up = True
        description = lifecycle.describe(self._place)
        self._owner, self._owner_start = description.owner or 0, description.owner_start
        self._watch_owner()
        gc.collect()
        gc.freeze()
        daemons = {each.node: each for each in processes.recorded(self._place, processes.DAEMON)}
        for node in self._nodes:
            node.off = not power.read(self._place, node.index).on
            if node.off:
                self._end_node(node)  # its predecessor may have been killed in the middle of that
                self._loop.call_later(0, partial(self._restart, node))
                continue
            known = daemons.get(node.index)
            pidfd = processes.open_pidfd(known) if known else None
            if known is None or pidfd is None:
                self._lost(node)
                continue
            node.daemon_pid = known.pid
            self._watch_adopted(node, pidfd)
        self._listen_control()
        log(WARNING, f"supervisor {os.getpid()} takes over from one that was killed")
        processes.note_restart(self._place, "supervisor", 0, "was killed")
        self._loop.run()

    def _failed(self, error: Exception) -> None:
        """Something went wrong that nobody thought of: it concerns one event, the others go on."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        log(ERROR, f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})")
        if not self._up:
            self._fail(str(error))

    def _prepare(self) -> None:
        self._loop.on_signal(signal.SIGTERM, self._loop.stop)
        self._loop.on_signal(signal.SIGCHLD, self._reap)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def _new_store(self, node: int, given: Power) -> Store:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener = self._listen(self._place.socket(node))
        return Store(
            node, listener.detach(), ours.detach(), theirs.detach(),
            last_serial=given.last_serial, boot=given.boot,
        )  # fmt: skip

    def _listen(self, path: Path) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path.unlink(missing_ok=True)
        listener.bind(os.fspath(path))
        os.chmod(path, 0o600)
        listener.listen(1024)
        return listener

    def _listen_control(self) -> None:
        listener = self._listen(self._place.control)
        listener.setblocking(False)
        self._loop.watch(listener.fileno(), lambda: self._accept_control(listener))

    def _watch_owner(self) -> None:
        if not self._owner:
            return
        owner = processes.Process(self._owner, self._owner_start or 0, "owner")
        descriptor = processes.open_pidfd(owner)
        if descriptor is None:
            self._owner_ended()
        else:
            self._loop.watch(descriptor, self._owner_ended)

    def _owner_ended(self) -> None:
        log(INFO, f"process {self._owner}, which this cluster belongs to, has ended: so does the cluster")
        self._loop.stop()

    def _check_started(self) -> None:
        if not self._up:
            waiting = [node.name for node in self._nodes if not node.ready]
            shown = ", ".join(waiting[:5])
            self._fail(f"not ready after {_START_TIMEOUT_S:.0f} s: {shown}; the machine may be overloaded")

    def _fail(self, why: str) -> None:
        if not self._up and self._failure is None:
            self._failure = why
            self._loop.stop()

    def _node_ready(self, node: Node) -> None:
        node.ready = True
        for connection in node.waiting:
            channel.send(connection, node=node.index)
        node.waiting.clear()
        if self._up or not all(each.ready for each in self._nodes):
            return
        description = lifecycle.Description(
            self._place.cluster, self._count, time.time(), processes.boot_id(),
            self._owner or None, self._owner_start,
        )  # fmt: skip
        draft = self._place.description.with_suffix(".draft")
        try:
            draft.write_text(description.as_json(), encoding="utf-8")
        except OSError as error:
            self._fail(_not_started(self._place, error))
            return
        draft.rename(self._place.description)
        self._up = True
        try:
            os.write(1, lifecycle.answer(ready=True))
        except BrokenPipeError:
            self._loop.stop()  # whoever asked was interrupted: undo it
            return
        output = open_log(self._place.logs / "supervisor.log")
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        log(
            INFO,
            f"cluster '{self._place.cluster}' is up: {self._count} nodes"
            f" in {time.monotonic() - self._began:.3f} s",
        )

    # ---- daemons ----

    def _fork_daemon(self, node: Node) -> None:
        if node.off or node.store is None:
            return  # killed since its successor was planned
        node.started = time.monotonic()
        ends: tuple[socket.socket, ...] = ()
        try:
            ours, theirs = ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            pid = os.fork()
        except OSError as error:
            log(ERROR, f"{node.name} cannot have a daemon: {error.strerror}; another try follows")
            for each in ends:
                each.close()
            self._plan_daemon(node, _DAEMON_BACKOFF_S[-1])
            return
        if not pid:
            signal.set_wakeup_fd(-1)
            # Everything of other nodes is closed by number; the objects are never freed (os._exit).
            keep = sorted({0, 1, 2, self._lock, theirs.fileno(), *node.store.descriptors()})
            for low, high in zip(keep, [*keep[1:], 1 << 30], strict=True):
                os.closerange(low + 1, high)
            become_daemon(
                self._place, self._count, node.store, theirs, self._lock, self._protocol, self._sizes
            )
        theirs.close()
        node.daemon_pid = pid
        self._by_pid[pid] = node
        self._join(node, ours)
        self._record_daemon(node, pid)

    def _plan_daemon(self, node: Node, delay_s: float) -> None:
        """Forks a successor later, unless the node has begun another life by then, or has one."""
        store, last = node.store, node.daemon_pid

        def fork() -> None:
            if node.store is store and node.daemon_pid == last:
                self._fork_daemon(node)

        self._loop.call_later(delay_s, fork)

    def _record_daemon(self, node: Node, pid: int) -> processes.Process | None:
        return processes.record(
            self._place, pid, processes.DAEMON, node.index, f"daemon of {node.name}"
        )

    def _join(self, node: Node, connection: socket.socket) -> None:
        node.channel = connection
        node.outbox = Outbox(self._loop, connection, lambda: self._take_message(node))
        if any(node.index in wiring.nodes for wiring in self._wirings.values()):
            node.outbox.tell(what="wires", number=self._wirings_begun)

    def _part(self, node: Node) -> None:
        if node.outbox is not None:
            node.outbox.close()
        node.channel = node.outbox = None

    def _take_message(self, node: Node) -> None:
        self._hear_daemon(node)

    def _hear_daemon(self, node: Node) -> bool:
        """Takes one message; False: there is none."""
        if node.channel is None or node.store is None:
            return False
        try:
            received = channel.receive(node.channel)
        except BlockingIOError:
            return False
        if received is None:
            self._part(node)
            return False
        message, descriptors = received
        endpoints = node.store.endpoints
        match message["what"]:
            case "ready":
                self._node_ready(node)
            case "failed":
                self._fail(message["why"])
                for connection in node.waiting:
                    why = f"{node.name} is on, and has yet to be up: {message['why']}"
                    channel.send(connection, errno=0, message=why)
                node.waiting.clear()
            case "damaged":
                # Later: it may be the node that we are just hearing.
                self._loop.call_later(0, lambda: self._repair(node, message["node"], message["boot"]))
            case "nic":
                node.store.nic_pid = message["pid"]
            case "wired":
                self._wired(node, message["number"])
            case "endpoint":
                serial = message["serial"]
                node.store.last_serial = max(serial, node.store.last_serial)
                if len(descriptors) == 2:
                    attach, pidfd = descriptors
                    endpoints[serial] = Endpoint(serial, message["index"], message["pid"], attach, pidfd)
                    return True
                log(ERROR, f"{node.name}: no descriptor is left for pid {message['pid']}")
            case "waker" if message["serial"] in endpoints:
                number = message["number"]
                if not endpoints[message["serial"]].add_waker(number, descriptors):
                    log(WARNING, f"{node.name}: no descriptor is left for a program's waker {number}")
                return True
            case "replied" if message["serial"] in endpoints:
                endpoints[message["serial"]].replied = True
            case "ending" if message["serial"] in endpoints:
                endpoints[message["serial"]].ending = True
            case "gone" if message["serial"] in endpoints:
                endpoints.pop(message["serial"]).close()
        for descriptor in descriptors:  # of what cannot be kept, or of what was not kept before
            os.close(descriptor)
        return True

    def _daemon_ended(self, node: Node, how: str, *, killed: bool) -> None:
        while self._hear_daemon(node):  # its last words count: the successor starts from them
            pass
        self._part(node)
        if not self._up:
            self._fail(f"the daemon of {node.name} {how}")
            return
        if node.off:
            return
        processes.note_restart(self._place, f"{node.name}.daemon", node.daemon_pid, how)
        if node.store is None:
            self._lost(node)
            return
        if time.monotonic() - node.started >= _DAEMON_YOUNG_S:
            node.deaths.clear()
        else:
            node.deaths.append(killed)
        delay = pause_before(node.deaths, _DAEMON_BACKOFF_S, spared=0)
        log(
            WARNING,
            f"{node.name} daemon {node.daemon_pid} {how};"
            f" a successor starts {f'in {delay} s' if delay else 'now'}",
        )
        if delay:
            self._plan_daemon(node, delay)
        else:
            self._fork_daemon(node)

    def _lost(self, node: Node) -> None:
        """Its daemon died while there was no supervisor: nobody has what a successor would need."""
        node.store = None
        log(
            ERROR,
            f"{node.name} has lost its daemon and the supervisor at the same time: its programs go on, no"
            f" other can attach; `vmmc-emu node kill {node.index}` and `node start {node.index}` mend it",
        )

    def _watch_adopted(self, node: Node, pidfd: int) -> None:
        """A daemon that is no child of ours: only its end can be learnt, and not how."""
        pid = node.daemon_pid

        def ended() -> None:
            self._loop.unwatch(pidfd)
            os.close(pidfd)
            if node.daemon_pid == pid:
                self._daemon_ended(node, "was killed", killed=True)

        self._loop.watch(pidfd, ended)

    def _adopt(self, connection: socket.socket, message: dict[str, Any], descriptors: list[int]) -> None:
        """The daemon of a supervisor that was killed joins: what follows on this connection is its store."""
        node = self._nodes[message["node"]]
        pid, _ = channel.peer(connection)
        listener, control, nic_control = descriptors
        numbers = [int(message[key]) for key in ("nic_pid", "last_serial", "boot")]
        if node.channel is not None or node.off or node.store is not None:
            raise ClusterError(f"{node.name} has a daemon, or is off")
        if node.daemon_pid != pid:  # its maker was killed before it could write it down
            daemon = self._record_daemon(node, pid)
            pidfd = processes.open_pidfd(daemon) if daemon else None
            if pidfd is None:
                raise ClusterError(f"daemon {pid} of {node.name} is gone")
            node.daemon_pid = pid
            self._watch_adopted(node, pidfd)
        node.store = Store(
            node.index, listener, control, nic_control,
            nic_pid=numbers[0], last_serial=numbers[1], boot=numbers[2],
        )  # fmt: skip
        node.started = time.monotonic()
        self._join(node, connection)
        log(INFO, f"{node.name} daemon {pid} has joined")
        if node.outbox is not None:  # what was changed while it had nobody to tell it
            node.outbox.tell(what="wires", number=self._wirings_begun)
            node.outbox.tell(what="power")

    # ---- power ----

    def _kill_node(self, node: Node, *, restart: bool = False) -> dict[str, Any]:
        """Everything on it ends at once, and what it had in memory is gone.  Its peers' NICs are told.

        When that fails half-way (for want of descriptors, say) it can be asked again.
        """
        was = power.read(self._place, node.index)
        if node.off and node.store is None and not was.restart:
            raise ClusterError(f"{node.name} is off already")
        last_serial = node.store.last_serial if node.store else was.last_serial
        if node.store is None and not node.off:
            last_serial += _SERIALS_UNKNOWN
        # First: who comes after us knows that nobody is to be brought back.
        power.write(self._place, node.index, Power(False, was.boot, last_serial, restart))
        if not restart:
            for connection in node.waiting:
                channel.send(connection, errno=0, message=f"{node.name} was killed before it was up")
            node.waiting.clear()
        self._end_node(node)
        self._tell_losses()
        return {"node": node.index}

    def _end_node(self, node: Node) -> None:
        """Ends what runs on a node that is off by its record; done again, it changes nothing."""
        node.off = True
        mine = [each for each in processes.recorded(self._place) if each.node == node.index]
        nic = processes.nic_of(self._place, node.index)
        processes.kill([*mine, *([nic] if nic else [])])
        for _ in range(5):  # a program may start another while we look
            found = [each for each in processes.programs(self._place) if each.node == node.index]
            if not found:
                break
            processes.kill(found)
        self._part(node)
        if node.store is not None:
            node.store.close()
            node.store = None
        self._place.socket(node.index).unlink(missing_ok=True)
        lifecycle.remove_segments(self._place, node.index)
        for kind in (processes.DAEMON, processes.NIC):
            processes.forget(self._place, kind, node.index, 0)
        node.ready = False
        node.deaths.clear()
        self._wired(node, self._wirings_begun)  # its next daemon reads of them
        log(WARNING, f"{node.name} has lost its power")

    def _repair(self, by: Node, index: int, boot: int) -> None:
        """A node whose shared memory somebody removed or cut, as `by` says: a machine whose memory failed."""
        node = self._nodes[index]
        if node.off or node.store is None or node.store.boot != boot:
            return  # it is another life's by now
        how = "shared memory removed or truncated: it loses its power, and is started anew"
        log(ERROR, f"{node.name}: {how}")
        if node is not by:  # whose daemon has written down why its NIC ended
            found = f"{by.name} found {how}"
            processes.note_restart(self._place, f"{node.name}.nic", node.store.nic_pid, found)
        try:
            self._kill_node(node, restart=True)
        except OSError as error:
            log(ERROR, f"{node.name} cannot be ended: {error}; another try follows")
            again = partial(self._restart, node) if node.off else partial(self._repair, by, index, boot)
            self._loop.call_later(_DAEMON_BACKOFF_S[-1], again)
            return
        self._restart(node)

    def _restart(self, node: Node) -> None:
        """Starts a node that is off for a moment only, as often as it takes."""
        if not node.off or not power.read(self._place, node.index).restart:
            return  # somebody has started it, or killed it for good
        try:
            self._power_on(node)
        except OSError as error:
            log(ERROR, f"{node.name} cannot be started anew: {error}; another try follows")
            self._loop.call_later(_DAEMON_BACKOFF_S[-1], partial(self._restart, node))

    def _start_node(self, node: Node, connection: socket.socket) -> None:
        """Brings it back, empty; whoever asked is answered when it is ready."""
        if not node.off:
            raise ClusterError(f"{node.name} is on")
        self._power_on(node)
        node.waiting.append(connection)

    def _power_on(self, node: Node) -> None:
        """Gives a node that is off a daemon, and with it its next life."""
        if node.store is not None:
            self._end_node(node)  # which failed half-way
        was = power.read(self._place, node.index)
        given = Power(True, was.boot + 1, was.last_serial)
        store = self._new_store(node.index, given)
        try:
            power.write(self._place, node.index, given)
        except OSError:
            store.close()
            self._place.socket(node.index).unlink(missing_ok=True)
            raise
        node.off, node.store = False, store
        log(INFO, f"{node.name} is started, for the {given.boot}. time")
        self._tell_losses()
        self._fork_daemon(node)

    def _tell_losses(self) -> None:
        for node in self._nodes:
            if node.outbox is not None:
                node.outbox.tell(what="power")

    # ---- children ----

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
                log(INFO, f"{names.node_name(at)} program {pid} {describe_exit(program.wait())}")
                processes.forget(self._place, processes.PROGRAM, at, pid)
                continue
            _, status = os.waitpid(pid, 0)
            node = self._by_pid.pop(pid, None)
            if node and node.daemon_pid == pid:  # else the node lost its power, and is on again
                code = os.waitstatus_to_exitcode(status)
                self._daemon_ended(node, describe_exit(code), killed=code == -signal.SIGKILL)

    # ---- requests ----

    def _accept_control(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log(WARNING, f"a request cannot be taken: {error.strerror}")
            self._loop.unwatch(listener.fileno())  # it stays in the queue and would call again at once
            self._loop.call_later(
                0.2, lambda: self._loop.watch(listener.fileno(), lambda: self._accept_control(listener))
            )
            return
        pid, uid = channel.peer(connection)
        if uid != os.getuid():
            log(WARNING, f"refused pid {pid} of user {uid}: it is another user's")
            connection.close()
            return
        connection.setblocking(False)
        self._loop.watch(connection.fileno(), lambda: self._hear_control(connection))

    def _hear_control(self, connection: socket.socket) -> None:
        descriptors: list[int] = []
        answer: dict[str, Any] | None
        try:
            received = channel.receive(connection)
            if received is None:
                self._drop_control(connection)
                return
            message, descriptors = received
            message = channel.opened(message, descriptors, lifecycle.REQUEST_BYTES_MOST)
            answer = self._answer(connection, message, descriptors)
        except BlockingIOError:
            return
        except ClusterError as error:
            answer = {"errno": 0, "message": str(error), "filename": None}
        except OSError as error:
            answer = {"errno": error.errno, "message": error.strerror, "filename": error.filename}
        except (LookupError, TypeError, ValueError, AttributeError, subprocess.SubprocessError) as error:
            why = f"a request that is none: {type(error).__name__}: {error}"
            log(WARNING, f"pid {channel.peer(connection)[0]} sent {why}")
            answer = {"errno": 0, "message": why, "filename": None}
        if answer is None:
            return  # answered later, or no request any more
        for descriptor in descriptors:
            os.close(descriptor)
        if "message" in answer:  # which may quote what was asked, at its length
            answer["message"] = str(answer["message"])[:_MESSAGE_MOST]
        channel.send(connection, **answer)

    def _drop_control(self, connection: socket.socket) -> None:
        for node in self._nodes:
            node.waiting = [each for each in node.waiting if each is not connection]
        for number, wiring in list(self._wirings.items()):
            if wiring.connection is connection:
                del self._wirings[number]
        self._loop.unwatch(connection.fileno())
        connection.close()

    def _answer(
        self, connection: socket.socket, message: dict[str, Any], descriptors: list[int]
    ) -> dict[str, Any] | None:
        if message.get("what") != "daemon" and channel.has_hung_up(connection):
            return {}  # asked and given up while this process was stopped, say: nobody counts on it
        if "wires" in message:
            return self._change_wires(connection, [Change.from_json(each) for each in message["wires"]])
        node = self._node(message["node"])
        match message.get("what", "program"):
            case "daemon":
                self._adopt(connection, message, descriptors)
                return None
            case "kill":
                return self._kill_node(node)
            case "start":
                self._start_node(node, connection)
                return None
            case "program":
                if node.off:
                    raise ClusterError(lifecycle.is_off(self._place, node.index))
                return self._spawn(node.index, *descriptors)
        raise ValueError("it asks for nothing that there is")

    def _node(self, which: object) -> Node:
        if not isinstance(which, int) or not 0 <= which < self._count:
            raise ClusterError(f"there is no node {which!r}: the cluster has {self._count}")
        return self._nodes[which]

    # ---- wires ----

    def _change_wires(self, connection: socket.socket, changes: list[Change]) -> dict[str, Any] | None:
        """Checks, records and passes on; nothing is changed when one of the changes cannot be.

        Whoever asked is answered when the NICs have been told.
        """
        changed: dict[int, dict[int, Wire]] = {}
        perfect = Wire()
        for change in changes:
            checked: dict[Wire, Wire] = {}  # those before: mostly alike
            for sender, receiver in change.pairs(self._count):
                if receiver not in changed:
                    changed[receiver] = wires.read(self._place, receiver)
                before = perfect if change.reset else changed[receiver].get(sender, perfect)
                after = checked.get(before)
                if after is None:
                    after = checked[before] = Wire.checked(before, change.settings)
                changed[receiver][sender] = after
        wires.write(self._place, changed)
        answer = {"wires": sum(len(leading) for leading in changed.values())}
        concerned = {receiver for receiver in changed if not self._nodes[receiver].off}
        if not concerned:
            return answer
        self._wirings_begun += 1
        number = self._wirings_begun
        self._wirings[number] = Wiring(connection, concerned, len(concerned), answer)
        for receiver in concerned:
            outbox = self._nodes[receiver].outbox
            if outbox is not None:  # without a daemon: the next one is told as soon as it joins
                outbox.tell(what="wires", number=number)
        self._loop.call_later(_WIRED_S, partial(self._not_wired, number))
        return None

    def _wired(self, node: Node, upto: int) -> None:
        """Its NIC knows all changes up to that number."""
        for number, wiring in list(self._wirings.items()):
            if number <= upto:
                wiring.nodes.discard(node.index)
            if not wiring.nodes:
                del self._wirings[number]
                channel.send(wiring.connection, **wiring.answer)

    def _not_wired(self, number: int) -> None:
        wiring = self._wirings.get(number)
        if wiring is None:
            return
        if len(wiring.nodes) < wiring.awaited:  # there are many, and more every time
            wiring.awaited = len(wiring.nodes)
            self._loop.call_later(_WIRED_S, partial(self._not_wired, number))
            return
        del self._wirings[number]
        late = [self._nodes[index] for index in sorted(wiring.nodes)]
        why = (
            "the change is written down, but has not come into force on"
            f" {', '.join(node.name for node in late[:8])}{' and others' if len(late) > 8 else ''}"
            f" in {_WIRED_S:.0f} s: the node has no daemon, or that is stopped; a daemon that goes on, or is"
            " started, puts it into force"
        )
        log(WARNING, why)
        channel.send(wiring.connection, errno=0, message=why)

    def _spawn(self, node: int, description: int, standard_input: int, output: int) -> dict[str, Any]:
        """Starts a program from its description: JSON in a file, as an environment may be large."""
        size = os.fstat(description).st_size
        wanted = json.loads(os.pread(description, size, 0))

        def settle() -> None:
            # The limits of the shell in which it was asked for, not ours.
            for number, (soft, hard) in wanted["limits"]:
                highest = _lower(hard, resource.getrlimit(number)[1])
                resource.setrlimit(number, (_lower(soft, highest), highest))
            _leave_terminal()

        program = subprocess.Popen(
            wanted["arguments"], env=wanted["environment"], cwd=wanted["directory"], umask=wanted["umask"],
            stdin=standard_input, stdout=output, stderr=output, process_group=0, preexec_fn=settle,
        )  # fmt: skip
        self._programs[program.pid] = (program, node)
        command = " ".join(wanted["arguments"])
        processes.record(self._place, program.pid, processes.PROGRAM, node, command)
        log(INFO, f"{names.node_name(node)} program {program.pid} started: {command[:200]}")
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
        directories = (place.processes, place.logs, place.wires, place.power, place.restarts)
        for directory in (place.runtime, *directories):
            paths.make_private_directory(directory)
        files.write(place, nodes)
        supervision = os.open(place.supervision, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(supervision, fcntl.LOCK_EX)  # held until we end, however that comes
        set_title(f"vmmc-emu: {cluster} supervisor", "vmmc supervisor")
        processes.record(place, os.getpid(), processes.SUPERVISOR, command="supervisor")
        become_subreaper()
        failure = Supervisor(place, nodes, owner, lock).run()
    except OSError as error:
        failure = _not_started(place, error)
    finally:  # also for what nobody thought of
        clean_up(place, lock)
    return refuse(failure) if failure else 0


def succeed(cluster: str, nodes: int, runtime: str) -> int:
    """Runs the successor of a supervisor that was killed; see the descriptors above."""
    lock, supervision = 3, 4
    os.closerange(5, 1 << 30)
    for descriptor in (lock, supervision):
        os.set_inheritable(descriptor, False)
    os.chdir("/")
    os.umask(0o077)
    place = paths.ClusterPaths(cluster, Path(runtime))
    if place.ending.exists():
        return 1
    set_title(f"vmmc-emu: {cluster} supervisor", "vmmc supervisor")
    processes.record(place, os.getpid(), processes.SUPERVISOR, command="supervisor")
    become_subreaper()
    Supervisor(place, nodes, 0, lock).succeed()
    clean_up(place, lock)
    return 0


def _not_started(place: paths.ClusterPaths, error: OSError) -> str:
    if error.strerror is None:  # a library's, in its own words
        return str(error)
    where = Path(error.filename or place.runtime)
    return str(paths.not_recorded(where, error, "nothing was started").strerror)


def clean_up(place: paths.ClusterPaths, lock: int) -> None:
    """Ends all that runs in the cluster, removes every trace of it, and frees its name."""
    lifecycle.end_processes(place)
    lifecycle.remove_files(place)
    paths.release_lock(place, lock)
    reap()


def reap() -> None:
    """Takes the exit statuses of all that has ended: not every machine's first process does it for us."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _leave_terminal() -> None:
    """As setsid would, but within the session: see "Scheduling" in docs/architecture.md."""
    with contextlib.suppress(OSError):  # there is none
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        fcntl.ioctl(terminal, termios.TIOCNOTTY)
        os.close(terminal)


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
    if sys.argv[5:] == ["succeed"]:
        sys.exit(succeed(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
