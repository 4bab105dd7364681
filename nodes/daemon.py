"""A node's daemon: attaches programs, owns their segments, keeps the NIC running, cleans up after deaths.

It is on nobody's data path: a program that has attached does not need it to connect, send or receive.
Everything it does is an event: a message on a socket, or the end of a process (pidfd, or the attach
socket closing, which is how an exec shows).
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import posix_ipc
from vmmc_emu.nodes import channel, journal
from vmmc_emu.nodes.channel import Endpoint, Store
from vmmc_emu.nodes.journal import ERROR, INFO, WARNING, log
from vmmc_emu.nodes.messages import Protocol
from vmmc_emu.nodes.title import set_title

from vmmc_emu import limits, names, paths, power, processes, wires
from vmmc_emu.loop import Loop

_SO_PEERPIDFD = 77  # Linux 6.5; not yet in the socket module

# Header and dirty bits of an endpoint's segments: promised to both sides at once, hence committed.
_CONTROL_BYTES = 5 * 4096

_NIC_YOUNG_S = 1.0  # NICs that die younger than this, one after the other, are restarted ever later
_NIC_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

_SEEK_FIRST_S, _SEEK_LAST_S = 0.02, 1.0  # between looks for the next supervisor: doubling


class Daemon:
    """One node's daemon; `run` returns when it is told to end."""

    def __init__(
        self,
        place: paths.ClusterPaths,
        nodes: int,
        store: Store,
        supervisor: socket.socket,
        name_lock: int,
        protocol: Protocol,
        sizes: dict[str, int],
    ) -> None:
        self._place, self._nodes, self._store = place, nodes, store
        self._node, self._name = store.node, names.node_name(store.node)
        self._name_lock = name_lock  # the cluster's: held as long as one of us lives
        self._protocol, self._sizes = protocol, sizes
        self._loop = Loop(self._failed)
        journal.begin(self._loop.call_later)
        self._supervisor: socket.socket | None = None
        self._to_supervisor: channel.Outbox | None = None
        self._seek_pause_s = _SEEK_FIRST_S
        self._children: set[int] = set()  # supervisors that we started
        self._begin_with(supervisor)
        self._listener = socket.socket(fileno=store.listener)
        self._control = socket.socket(fileno=store.control)
        self._to_nic = channel.Outbox(self._loop, self._control, self._hear_nic)
        self._sockets: dict[int, socket.socket] = {}  # attach sockets by descriptor
        self._indices: dict[int, int] = {}  # endpoint index → serial
        # What the NIC serves and nobody told us of, serial → index: it is to end.
        self._strangers: dict[int, int] = {}
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # to refuse somebody without another
        self._nic_pidfd = -1
        self._nic_started = 0.0
        self._nic_deaths: list[bool] = []  # of those that died young, in a row; True: by SIGKILL
        self._nic_ready = False
        self._wires: dict[int, wires.Wire] = {}  # that lead here, as the NIC was told, by their beginning

    def run(self) -> None:
        """Serves the node until SIGTERM."""
        self._loop.on_signal(signal.SIGTERM, self._loop.stop)
        self._loop.on_signal(signal.SIGCHLD, self._reap)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self._store.nic_pid:
            self._take_over()
        else:
            self._end_stray_nic()  # found by its lock of what is made anew next
            self._make_node_segments()
            self._start_nic()
        self._listener.setblocking(False)
        self._loop.watch(self._listener.fileno(), self._accept)
        self._loop.run()
        log(INFO, f"{self._name} daemon ends")

    def _failed(self, error: Exception) -> None:
        """Something went wrong that nobody thought of: it concerns one event, the others go on."""
        at = traceback.extract_tb(error.__traceback__)[-1]
        log(ERROR, f"{self._name} daemon: {type(error).__name__}: {error} ({at.name}, line {at.lineno})")

    def _reap(self) -> None:
        for pid in list(self._children):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self._children.discard(pid)

    # ---- the node's segments ----

    def _segment(self, what: str, size: int, committed: int) -> posix_ipc.SharedMemory:
        """Makes a segment whose first `committed` bytes no store can find missing (SIGBUS)."""
        name = names.segment_name(self._place.cluster, self._node, what)
        try:
            segment = open_segment(name, posix_ipc.O_CREX, mode=0o600, size=size)
        except posix_ipc.ExistentialError:
            # Of a daemon that died in the middle of making it: nobody has been told of it.
            posix_ipc.unlink_shared_memory(name)
            segment = open_segment(name, posix_ipc.O_CREX, mode=0o600, size=size)
        try:
            if committed:
                os.posix_fallocate(segment.fd, 0, committed)
        except OSError:
            segment.close_fd()
            segment.unlink()
            raise
        return segment

    def _make_node_segments(self) -> None:
        for what in ("pub", "door", "state"):
            size = self._sizes[what]
            self._segment(what, size, 0 if what == "state" else size).close_fd()

    def _unlink(self, what: str) -> None:
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(names.segment_name(self._place.cluster, self._node, what))

    # ---- the NIC ----

    def _end_stray_nic(self) -> None:
        """One of which nobody knows, because its daemon was killed before it could tell."""
        if stray := processes.nic_of(self._place, self._node):
            log(WARNING, f"{self._name}: NIC {stray.pid}, which a predecessor started last, makes room")
            processes.kill([stray])

    def _start_nic(self) -> None:
        self._end_stray_nic()
        # What its predecessor left unread would be heard twice: everything is said anew below.
        self._to_nic.clear()
        with (
            contextlib.suppress(BlockingIOError),
            socket.socket(fileno=os.dup(self._store.nic_control)) as theirs,
        ):
            while True:
                _, descriptors = channel.receive_descriptors(theirs, 4096, socket.MSG_DONTWAIT)
                for descriptor in descriptors:
                    os.close(descriptor)
        self._nic_ready = False
        program = str(paths.native_file("vmmc-nic"))
        output = open_log(self._place.logs / f"{self._name}.nic.log")
        try:
            pid = self._spawn_nic(program, output)
        except OSError as error:
            log(ERROR, f"{self._name} cannot start its NIC: {error.strerror}; it tries again")
            self._tell_supervisor(what="failed", why=f"{program} cannot be started: {error.strerror}")
            self._loop.call_later(_NIC_BACKOFF_S[-1], self._start_nic)
            return
        finally:
            os.close(output)
        self._store.nic_pid = pid
        self._nic_started = time.monotonic()
        processes.record(self._place, pid, processes.NIC, self._node, f"vmmc-nic of {self._name}")
        self._tell_supervisor(what="nic", pid=pid)
        self._nic_pidfd = os.pidfd_open(pid)
        self._loop.watch(self._nic_pidfd, self._nic_ended)

    def _spawn_nic(self, program: str, output: int) -> int:
        return os.posix_spawn(
            program,
            [
                *("vmmc-nic", "--cluster", self._place.cluster, "--uid", str(os.getuid())),
                *("--node", str(self._node), "--nodes", str(self._nodes), "--control", "3"),
                *("--boot", str(self._store.boot)),
            ],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output, 2),
                (os.POSIX_SPAWN_DUP2, self._store.nic_control, 3),
            ],
            setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT),
        )

    def _nic_ended(self) -> None:
        self._loop.unwatch(self._nic_pidfd)
        os.close(self._nic_pidfd)
        pid = self._store.nic_pid
        damaged, killed = False, True
        try:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            killed = code == -signal.SIGKILL
            damaged = code == self._protocol.EXIT_DAMAGED
            how = describe_exit(code)
            if damaged:
                how = "ended: its node's shared memory was removed or truncated"
        except ChildProcessError:
            how = "ended (it was a predecessor daemon's)"
        if not self._nic_ready and not self._nic_deaths:
            # The first one, or one that was never heard of: say why where `up` waits for an answer.
            self._tell_supervisor(what="failed", why=f"the NIC of {self._name} {how}{self._nic_last_words()}")
        if time.monotonic() - self._nic_started >= _NIC_YOUNG_S:
            self._nic_deaths.clear()
        else:
            self._nic_deaths.append(killed)
        delay: float = 0
        if damaged:
            delay = _NIC_BACKOFF_S[-1]
        elif not os.environ.get("VMMC_RESTART_AT_ONCE"):
            delay = pause_before(self._nic_deaths, _NIC_BACKOFF_S, spared=1)
        when = f"in {delay} s" if delay else "now"
        log(WARNING, f"{self._name} NIC {pid} {how}; a successor starts {when}")
        processes.note_restart(self._place, f"{self._name}.nic", pid, how)
        processes.forget(self._place, processes.NIC, self._node, pid)
        if damaged:  # the supervisor ends the node, this daemon included; should it be gone, the next is told
            self._tell_supervisor(what="damaged", node=self._node, boot=self._store.boot)
        if delay:
            self._loop.call_later(delay, self._start_nic)
        else:
            self._start_nic()

    def _nic_last_words(self) -> str:
        path = self._place.logs / f"{self._name}.nic.log"
        with contextlib.suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if lines:
                return f": {lines[-1]}"
        return ""

    def _take_over(self) -> None:
        """Goes on where a predecessor was killed: the NIC and the programs have noticed nothing."""
        for endpoint in self._store.endpoints.values():
            self._indices[endpoint.index] = endpoint.serial
            self._watch_endpoint(endpoint)
        # Programs that the predecessor had not yet told the supervisor of, since that was stopped, say:
        # nobody has their attach sockets.  Segments that the NIC does not use are removed, others when it
        # has done with them.
        for index, serial in enumerate(self._served()):
            if serial and serial not in self._store.endpoints:
                self._add_stranger(index, serial)
        prefix = names.segment_name(self._place.cluster, self._node, "ep").removeprefix("/")
        for segment in self._place.segments():
            digits, _, part = segment.removeprefix(prefix).partition(".")
            if not segment.startswith(prefix) or not digits.isdigit():
                continue
            serial = int(digits)
            # The NIC may have yet to hear of it: its number is not given again.
            self._store.last_serial = max(serial, self._store.last_serial)
            if serial not in self._store.endpoints and serial not in self._strangers:
                self._unlink(f"ep{serial}.{part}")
        nic = processes.nic_of(self._place, self._node)
        if nic is None or nic.pid != self._store.nic_pid:  # it may have yet to begin
            recorded = processes.recorded(self._place, processes.NIC)
            nic = next((each for each in recorded if each.pid == self._store.nic_pid), None)
        pidfd = processes.open_pidfd(nic) if nic else None
        if pidfd is None:
            log(WARNING, f"{self._name} daemon takes over from one that died; its NIC is gone too")
            processes.note_restart(
                self._place, f"{self._name}.nic", self._store.nic_pid, "ended while the node had no daemon"
            )
            self._start_nic()
            return
        log(INFO, f"{self._name} daemon takes over from one that died: NIC {self._store.nic_pid} goes on")
        self._nic_pidfd = pidfd
        self._nic_started = time.monotonic()
        self._loop.watch(pidfd, self._nic_ended)
        self._nic_ready = True
        self._tell_everything()  # whom the NIC serves and nobody has answered is answered when it says so
        self._tell_supervisor(what="ready")

    def _served(self) -> list[int]:
        """Serials of the endpoints that the NIC serves, or served when it was killed, by index; 0: none."""
        name = names.segment_name(self._place.cluster, self._node, "pub").removeprefix("/")
        serials = array.array("I")
        data = b""
        with contextlib.suppress(OSError), open(paths.SHM / name, "rb") as file:
            data = os.pread(
                file.fileno(), self._protocol.ENDPOINTS_MAX * serials.itemsize, self._sizes["served"]
            )
        serials.frombytes(data[: len(data) // serials.itemsize * serials.itemsize])
        return serials.tolist()

    def _add_stranger(self, index: int, serial: int) -> None:
        log(WARNING, f"{self._name}: the NIC serves endpoint {index}, serial {serial}, that nobody knows of")
        self._store.last_serial = max(serial, self._store.last_serial)
        self._strangers[serial] = index

    def _tell_stranger(self, serial: int) -> None:
        data = self._protocol.control.pack(
            kind=self._protocol.CONTROL_DETACH, endpoint=self._strangers[serial], serial=serial, value=1
        )
        self._to_nic.send(data)

    def _tell_everything(self) -> None:
        """Tells the NIC of every wire, loss of power and endpoint; what it knows already changes nothing."""
        self._tell_wires(everything=True)
        self._tell_losses()
        for serial in self._strangers:
            self._tell_stranger(serial)
        for endpoint in self._store.endpoints.values():
            self._tell_nic(self._protocol.CONTROL_ATTACH, endpoint, endpoint.pid)
            for number in endpoint.wakers:
                self._tell_nic(self._protocol.CONTROL_WAKER, endpoint, number, endpoint.waker(number))
            if endpoint.ending:
                self._tell_nic(self._protocol.CONTROL_DETACH, endpoint)

    def _tell_nic(
        self, kind: int, endpoint: Endpoint, value: int = 0, descriptors: tuple[int, ...] = ()
    ) -> None:
        data = self._protocol.control.pack(
            kind=kind, endpoint=endpoint.index, serial=endpoint.serial, value=value
        )
        self._to_nic.send(data, descriptors)

    def _tell_losses(self) -> None:
        """Tells the NIC which nodes lost their power, and when they last did."""
        for node, power_of in power.ever_off(self._place).items():
            lost = power_of.boot - power_of.on
            if node != self._node:
                self._to_nic.send(
                    self._protocol.control.pack(kind=self._protocol.CONTROL_LOST, serial=lost, value=node)
                )

    def _tell_wires(self, *, everything: bool = False) -> None:
        """Tells the NIC how wires are to be: those that have changed since it was told last, or all."""
        present = wires.read(self._place, self._node)
        for sender, wire in present.items():
            if not everything and wire == self._wires.get(sender):
                continue
            data = self._protocol.control_wire.pack(
                kind=self._protocol.CONTROL_WIRE, **{"from": sender}, **wire.control()
            )
            self._to_nic.send(data)
        self._wires = present

    def _hear_nic(self) -> None:
        for _ in range(64):  # then let others have their turn
            try:
                message = self._protocol.control.unpack(self._control.recv(4096))
            except BlockingIOError:
                return
            if message is None:
                log(WARNING, f"{self._name}: the NIC said something that is no message")
                continue
            if message["kind"] == self._protocol.CONTROL_READY:
                self._nic_is_ready(message["value"])
            elif message["kind"] == self._protocol.CONTROL_ATTACHED:
                attached = self._store.endpoints.get(message["serial"])
                if attached is not None and not attached.replied and not attached.ending:
                    self._reply(attached)
                elif attached is None and message["serial"] not in self._strangers:
                    # A predecessor's last word to the NIC, which heard it when we had looked.
                    self._add_stranger(message["endpoint"], message["serial"])
                    self._tell_stranger(message["serial"])
            elif message["kind"] == self._protocol.CONTROL_EXPELLED:
                expelled = self._store.endpoints.get(message["serial"])
                if expelled is not None and not expelled.ending:
                    if not expelled.replied:
                        self._say_no(self._sockets[expelled.attach], message["value"] or errno.EIO)
                    with contextlib.suppress(OSError):
                        # Threads that the NIC cannot wake, having no descriptor for that, wait for this, too.
                        self._sockets[expelled.attach].shutdown(socket.SHUT_RDWR)
                    self._detach(expelled, "is not served any more: the NIC's log says why")
            elif message["kind"] == self._protocol.CONTROL_DAMAGED:
                self._tell_supervisor(what="damaged", node=message["value"], boot=message["serial"])
            elif message["kind"] == self._protocol.CONTROL_GONE:
                self._forget_endpoint(message["serial"])

    def _nic_is_ready(self, pid: int) -> None:
        if pid != self._store.nic_pid:
            return  # a predecessor's last word
        self._nic_ready = True
        log(INFO, f"{self._name} NIC {pid} is ready")
        self._tell_everything()
        self._tell_supervisor(what="ready")

    # ---- programs ----

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log(WARNING, f"{self._name} cannot take a connection: {error.strerror}")
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                self._refuse_with_spare(error.errno)
            return
        pid, uid = channel.peer(connection)
        if uid != os.getuid():
            log(WARNING, f"{self._name} refused pid {pid} of user {uid}: it is another user's")
            connection.close()
            return
        connection.setblocking(False)
        descriptor = connection.fileno()
        self._sockets[descriptor] = connection
        self._loop.watch(descriptor, lambda: self._hear_newcomer(connection, pid))

    def _refuse_with_spare(self, error: int) -> None:
        """There are no more descriptors: whoever is first in the queue is told so, and waits for nothing."""
        os.close(self._spare)
        try:
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                self._say_no(connection, error)
                with contextlib.suppress(BlockingIOError):
                    connection.recv(4096)  # what is closed unread ends with a reset
                connection.close()
        finally:
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _drop(self, connection: socket.socket) -> None:
        self._loop.unwatch(connection.fileno())
        self._sockets.pop(connection.fileno(), None)
        connection.close()

    def _hear_newcomer(self, connection: socket.socket, pid: int) -> None:
        """The first message on a connection: it asks to be attached."""
        try:
            request = self._protocol.attach_request.unpack(connection.recv(4096))
        except BlockingIOError:
            return
        except ConnectionResetError:
            request = None
        if request is None or request["kind"] not in {self._protocol.ATTACH, self._protocol.VISIT}:
            log(WARNING, f"{self._name} hung up on pid {pid}: what it sent is no request to attach")
            self._drop(connection)
            return
        name = self._name
        if (request["magic"], request["version"]) != (self._protocol.MAGIC, self._protocol.VERSION):
            version = request["version"]
            log(WARNING, f"{name} refused pid {pid}: its library is of another version ({version})")
            self._refuse(connection, errno.EPROTO)
            return
        try:
            endpoint = self._new_endpoint(connection, pid)
        except OSError as error:
            hint, needed, free = "", 0, 0
            if error.errno in {errno.ENOSPC, errno.ENOMEM}:
                needed, free = 2 * _CONTROL_BYTES, limits.shm_free_bytes()
                needs, has = limits.mebibytes(needed), limits.mebibytes(free)
                hint = f": {needs} are needed in /dev/shm and {has} is free"
            log(WARNING, f"{name} cannot attach pid {pid}: {error.strerror}{hint}")
            self._refuse(connection, error.errno or errno.EIO, needed, free)
            return
        # It is answered when the NIC has said that it serves it, or why it cannot.
        self._tell_nic(self._protocol.CONTROL_ATTACH, endpoint, endpoint.pid)
        command = processes.command_of(pid)
        visits = request["kind"] == self._protocol.VISIT
        if not visits and not (self._place.processes / f"{processes.PROGRAM}-{pid}").exists():
            processes.record(self._place, pid, processes.PROGRAM, self._node, command)
        log(
            INFO,
            f"{name} attached pid {pid} as endpoint {endpoint.index}, serial {endpoint.serial}:"
            f" {command[:200]}",
        )

    def _say_no(self, connection: socket.socket, error: int, needed: int = 0, free: int = 0) -> None:
        if error in {errno.ENOSPC, errno.ENOMEM} and not needed:
            needed, free = 2 * _CONTROL_BYTES, limits.shm_free_bytes()
        with contextlib.suppress(OSError):
            connection.send(
                self._protocol.attach_reply.pack(
                    magic=self._protocol.MAGIC, error=error, needed_bytes=needed, free_bytes=free
                )
            )

    def _refuse(self, connection: socket.socket, error: int, needed: int = 0, free: int = 0) -> None:
        self._say_no(connection, error, needed, free)
        self._drop(connection)

    def _new_endpoint(self, connection: socket.socket, pid: int) -> Endpoint:
        taken = {*self._indices, *self._strangers.values()}
        index = next((i for i in range(self._protocol.ENDPOINTS_MAX) if i not in taken), None)
        if index is None:
            raise OSError(
                errno.EUSERS, f"a node has at most {self._protocol.ENDPOINTS_MAX} programs attached"
            )
        serial = self._store.last_serial + 1
        what = f"ep{serial}"
        pidfd = peer_pidfd(connection, pid)
        made: list[str] = []
        try:
            for part in ("app", "nic", "own"):
                segment = self._segment(
                    f"{what}.{part}", self._sizes[part], 0 if part == "own" else _CONTROL_BYTES
                )
                made.append(f"{what}.{part}")
                segment.close_fd()
        except OSError:
            os.close(pidfd)
            for name in made:
                self._unlink(name)
            raise
        endpoint = Endpoint(serial, index, pid, connection.fileno(), pidfd)
        # Before the program or the NIC hear of it: a successor must know everything that they know.
        self._tell_endpoint(endpoint)
        self._store.last_serial = serial
        self._store.endpoints[serial] = endpoint
        self._indices[index] = serial
        self._watch_endpoint(endpoint)
        return endpoint

    def _watch_endpoint(self, endpoint: Endpoint) -> None:
        if endpoint.attach not in self._sockets:
            self._sockets[endpoint.attach] = socket.socket(fileno=endpoint.attach)
        if not endpoint.ending:
            self._loop.watch(endpoint.attach, lambda: self._hear_program(endpoint))
            self._loop.watch(endpoint.pidfd, lambda: self._detach(endpoint, "ended"))

    def _reply(self, endpoint: Endpoint) -> None:
        descriptors = []
        try:
            for what in (f"ep{endpoint.serial}.app", f"ep{endpoint.serial}.nic", "pub"):
                segment = open_segment(
                    names.segment_name(self._place.cluster, self._node, what),
                    read_only=not what.endswith(".app"),
                )
                descriptors.append(segment.fd)
            data = self._protocol.attach_reply.pack(
                magic=self._protocol.MAGIC, error=0, node=self._node, nodes=self._nodes,
                endpoint=endpoint.index, serial=endpoint.serial,
            )  # fmt: skip
            socket.send_fds(self._sockets[endpoint.attach], [data], descriptors)
        except (OSError, posix_ipc.Error) as error:
            # Gone already, or its segments were removed under us: either way it has not been attached.
            self._say_no(self._sockets[endpoint.attach], getattr(error, "errno", None) or errno.EIO)
            self._detach(endpoint, f"could not be answered ({error})")
            if what == "pub" and isinstance(error, posix_ipc.ExistentialError):  # the node's own
                self._tell_supervisor(what="damaged", node=self._node, boot=self._store.boot)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        endpoint.replied = True
        self._tell_supervisor(what="replied", serial=endpoint.serial)

    def _hear_program(self, endpoint: Endpoint) -> None:
        try:
            data, descriptors = channel.receive_descriptors(self._sockets[endpoint.attach], 4096)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data, descriptors = b"", []
        if not data:
            # Its descriptor is close-on-exec: a process that still runs has called exec, or detached.
            self._detach(endpoint, "left (exec or end)")
            return
        request = self._protocol.attach_request.unpack(data)
        if (
            request is None
            or request["kind"] != self._protocol.WAKER
            or len(descriptors) > 1
            or request["waker"] > self._protocol.MEMORY
        ):
            log(WARNING, f"{self._name}: pid {endpoint.pid} sent a message that is none")
            for descriptor in descriptors:
                os.close(descriptor)
            return
        number = request["waker"]
        if not endpoint.add_waker(number, descriptors):
            log(WARNING, f"{self._name}: no descriptor is left for waker {number} of pid {endpoint.pid}")
        self._tell_waker(endpoint, number)
        self._tell_nic(self._protocol.CONTROL_WAKER, endpoint, number, endpoint.waker(number))

    def _detach(self, endpoint: Endpoint, how: str) -> None:
        """Its process cannot use it any more: the NIC delivers what was sent and then says GONE."""
        if endpoint.ending:
            return
        endpoint.ending = True
        self._loop.unwatch(endpoint.attach)
        self._loop.unwatch(endpoint.pidfd)
        self._tell_supervisor(what="ending", serial=endpoint.serial)
        self._tell_nic(self._protocol.CONTROL_DETACH, endpoint)
        if processes.start_of(endpoint.pid) is None:
            processes.forget(self._place, processes.PROGRAM, self._node, endpoint.pid)
        log(INFO, f"{self._name} pid {endpoint.pid}, endpoint {endpoint.index}, {how}")

    def _forget_endpoint(self, serial: int) -> None:
        endpoint = self._store.endpoints.get(serial)
        if serial in self._strangers:
            del self._strangers[serial]
            self._remove_segments(serial)
            return
        if endpoint is None or not endpoint.ending:
            return  # said twice, or too early: a live program's memory is not taken away
        self._remove_segments(serial)
        del self._store.endpoints[serial]
        del self._indices[endpoint.index]
        self._sockets.pop(endpoint.attach).detach()
        endpoint.close()
        self._tell_supervisor(what="gone", serial=serial)

    def _remove_segments(self, serial: int) -> None:
        for part in ("app", "nic", "own"):
            self._unlink(f"ep{serial}.{part}")

    # ---- the supervisor ----

    def _begin_with(self, supervisor: socket.socket) -> None:
        self._supervisor = supervisor
        self._to_supervisor = channel.Outbox(self._loop, supervisor, self._hear_supervisor)

    def _tell_supervisor(self, descriptors: tuple[int, ...] = (), **message: Any) -> None:
        """What a successor of this daemon will need.  Without a supervisor: the next one hears all."""
        if self._to_supervisor is not None:
            self._to_supervisor.tell(descriptors, **message)

    def _tell_endpoint(self, endpoint: Endpoint) -> None:
        self._tell_supervisor(
            (endpoint.attach, endpoint.pidfd),
            what="endpoint", serial=endpoint.serial, index=endpoint.index, pid=endpoint.pid,
        )  # fmt: skip

    def _tell_waker(self, endpoint: Endpoint, number: int) -> None:
        self._tell_supervisor(
            endpoint.waker(number), what="waker", serial=endpoint.serial, number=number
        )

    def _hear_supervisor(self) -> None:
        """A wire has changed, or a node has lost its power; or the supervisor was killed."""
        assert self._supervisor is not None
        assert self._to_supervisor is not None
        try:
            received = channel.receive(self._supervisor)
        except BlockingIOError:
            return
        if received is None:
            self._to_supervisor.close()
            self._supervisor = self._to_supervisor = None
            log(WARNING, f"{self._name}: the supervisor is gone; traffic and attaching go on")
            self._seek_supervisor()
        elif received[0].get("what") == "power":
            self._tell_losses()
        else:
            self._tell_wires()
            self._tell_supervisor(what="wired", number=received[0]["number"])

    def _seek_supervisor(self) -> None:
        """Joins the next supervisor.  The first daemon to notice that there is none starts it."""
        if self._supervisor is not None or self._place.ending.exists():
            return
        try:
            lock = os.open(self._place.supervision, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._start_supervisor(lock)
            except BlockingIOError:  # there is one: another daemon was faster
                self._join_supervisor()
            finally:
                os.close(lock)
        except OSError as error:
            log(WARNING, f"{self._name}: no supervisor yet: {error}")
        if self._supervisor is None:
            self._loop.call_later(self._seek_pause_s, self._seek_supervisor)
            self._seek_pause_s = min(2 * self._seek_pause_s, _SEEK_LAST_S)

    def _start_supervisor(self, lock: int) -> None:
        output = open_log(self._place.logs / "supervisor.log")
        # Above what they are to become: 0 to 4.
        given = (output, self._name_lock, lock)
        passed = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 10) for number in given]
        try:
            pid = os.posix_spawn(
                sys.executable,
                [
                    *(sys.executable, "-P", "-m", "vmmc_emu.nodes.supervisor", self._place.cluster),
                    *(str(self._nodes), str(self._place.runtime), "0", "succeed"),
                ],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    *((os.POSIX_SPAWN_DUP2, passed[0], number) for number in (1, 2)),
                    (os.POSIX_SPAWN_DUP2, passed[1], 3),
                    (os.POSIX_SPAWN_DUP2, passed[2], 4),
                ],
                setpgroup=0,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT),
            )
        finally:
            for number in (output, *passed):
                os.close(number)
        self._children.add(pid)
        log(INFO, f"{self._name} has started supervisor {pid}")

    def _join_supervisor(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            connection.connect(os.fspath(self._place.control))
        except OSError:
            connection.close()  # it does not listen yet
            return
        store = self._store
        self._begin_with(connection)
        self._seek_pause_s = _SEEK_FIRST_S
        self._tell_supervisor(
            (store.listener, store.control, store.nic_control),
            what="daemon", node=self._node, nic_pid=store.nic_pid, last_serial=store.last_serial,
            boot=store.boot,
        )  # fmt: skip
        for endpoint in store.endpoints.values():
            self._tell_endpoint(endpoint)
            for number in endpoint.wakers:
                self._tell_waker(endpoint, number)
            for told, what in ((endpoint.replied, "replied"), (endpoint.ending, "ending")):
                if told:
                    self._tell_supervisor(what=what, serial=endpoint.serial)
        if self._nic_ready:
            self._tell_supervisor(what="ready")


def peer_pidfd(connection: socket.socket, pid: int) -> int:
    """A descriptor of the process that connected."""
    try:
        return struct.unpack("i", connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0]  # type: ignore[no-any-return]
    except OSError as error:
        if error.errno not in {errno.ENOPROTOOPT, errno.EINVAL}:
            raise
    return os.pidfd_open(pid)


def open_segment(name: str, flags: int = 0, **how: Any) -> posix_ipc.SharedMemory:
    """posix_ipc.SharedMemory, whose error at a limit of descriptors names no errno."""
    try:
        return posix_ipc.SharedMemory(name, flags, **how)
    except OSError as error:
        if error.errno is None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from error
        raise


def open_log(path: Path) -> int:
    """A descriptor of a log file; of /dev/null when there is no room for one."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        log(WARNING, f"{path.name} cannot be written: {error.strerror}")
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


# Whoever kills with SIGKILL tries what happens, and sees it at once; more than so many, one after the other,
# are perhaps the kernel's doing, which wants memory.
KILLS_SPARED = 10


def pause_before(deaths: Sequence[bool], pauses_s: Sequence[float], spared: int) -> float:
    """Seconds until what has died young so often in a row (True: of SIGKILL) is started again.

    Of deaths like the last one so many cost no pause; of SIGKILL it is KILLS_SPARED.
    """
    if not deaths:
        return 0.0
    late = deaths.count(deaths[-1]) - (KILLS_SPARED if deaths[-1] else spared)
    return pauses_s[min(late, len(pauses_s)) - 1] if late > 0 else 0.0


def describe_exit(code: int) -> str:
    """An exit status, or the signal that ended a process as a negative number, in words."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
        return f"was ended by signal {-code}"
    return f"ended with status {code}"


def become_daemon(
    place: paths.ClusterPaths,
    nodes: int,
    store: Store,
    supervisor: socket.socket,
    name_lock: int,
    protocol: Protocol,
    sizes: dict[str, int],
) -> None:
    """What the child of the supervisor's fork does; never returns."""
    name = names.node_name(store.node)
    status = 1
    try:
        set_title(f"vmmc-emu: {place.cluster} {name} daemon", f"{name} daemon")
        output = open_log(place.logs / f"{name}.daemon.log")
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        Daemon(place, nodes, store, supervisor, name_lock, protocol, sizes).run()
        status = 0
    except BaseException as error:  # the boundary of the process: whatever it is must be told
        log(ERROR, f"{name} daemon fails: {type(error).__name__}: {error}")
        channel.send(supervisor, what="failed", why=f"the daemon of {name}: {error}")
        if not isinstance(error, (OSError, posix_ipc.Error)):
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(status)
