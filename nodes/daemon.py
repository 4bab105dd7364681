"""A node's daemon: attaches programs, owns their segments, keeps the NIC running, cleans up after deaths.

It is on nobody's data path: a program that has attached does not need it to connect, send or receive.
Everything it does is an event: a message on a socket, or the end of a process (pidfd, or the attach
socket closing, which is how an exec shows).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import sys
import time
from collections import deque
from pathlib import Path

import posix_ipc
from vmmc_emu.nodes import channel
from vmmc_emu.nodes.channel import Endpoint, Store
from vmmc_emu.nodes.messages import Protocol
from vmmc_emu.nodes.title import set_title

from vmmc_emu import limits, names, paths, processes, wires
from vmmc_emu.loop import Loop

_SO_PEERPIDFD = 77  # Linux 6.5; not yet in the socket module

# Header and dirty bits of an endpoint's segments: promised to both sides at once, hence committed.
_CONTROL_BYTES = 5 * 4096

_NIC_YOUNG_S = 1.0  # a NIC that dies younger than this is not restarted at once
_NIC_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def log(text: str) -> None:
    """One event, one line, in the daemon's log; the time as in the NIC's."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    with contextlib.suppress(OSError):  # a full disk must not stop a node
        os.write(2, f"{stamp}.{int(now * 1000) % 1000:03d}Z {text}\n".encode())


class Daemon:
    """One node's daemon; `run` returns when it is told to end."""

    def __init__(
        self,
        place: paths.ClusterPaths,
        nodes: int,
        store: Store,
        supervisor: socket.socket,
        protocol: Protocol,
        sizes: dict[str, int],
    ) -> None:
        self._place, self._nodes, self._store = place, nodes, store
        self._node = store.node
        self._protocol, self._sizes = protocol, sizes
        self._supervisor = supervisor
        self._loop = Loop()
        self._listener = socket.socket(fileno=store.listener)
        self._control = socket.socket(fileno=store.control)
        self._control.setblocking(False)
        self._outbox: deque[tuple[bytes, tuple[int, ...]]] = deque()  # control messages that did not fit
        self._sockets: dict[int, socket.socket] = {}  # attach sockets by descriptor
        self._indices: dict[int, int] = {}  # endpoint index → serial
        self._nic_pidfd = -1
        self._nic_started = 0.0
        self._nic_failures = 0
        self._nic_ready = False
        self._wires: dict[int, wires.Wire] = {}  # that lead here, as the NIC was told, by their beginning

    def run(self) -> None:
        """Serves the node until SIGTERM."""
        self._loop.on_signal(signal.SIGTERM, self._loop.stop)
        self._loop.on_signal(signal.SIGCHLD, lambda: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._loop.watch(self._control.fileno(), self._hear_nic)
        self._loop.watch(self._supervisor.fileno(), self._hear_supervisor)
        if self._store.nic_pid:
            self._take_over()
        else:
            self._make_node_segments()
            self._start_nic()
        self._listener.setblocking(False)
        self._loop.watch(self._listener.fileno(), self._accept)
        self._loop.run()
        log(f"{names.node_name(self._node)} daemon ends")

    # ---- the node's segments ----

    def _segment(self, what: str, size: int, committed: int) -> posix_ipc.SharedMemory:
        """Makes a segment whose first `committed` bytes no store can find missing (SIGBUS)."""
        name = names.segment_name(self._place.cluster, self._node, what)
        try:
            segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=size)
        except posix_ipc.ExistentialError:
            # Of a daemon that died in the middle of making it: nobody has been told of it.
            posix_ipc.unlink_shared_memory(name)
            segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=size)
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

    def _start_nic(self) -> None:
        # What its predecessor left unread would be heard twice: everything is said anew below.
        while self._outbox:
            for unsent in self._outbox.popleft()[1]:
                os.close(unsent)
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
        log_path = str(self._place.logs / f"{names.node_name(self._node)}.nic.log")
        pid = os.posix_spawn(
            program,
            [
                *("vmmc-nic", "--cluster", self._place.cluster, "--uid", str(os.getuid())),
                *("--node", str(self._node), "--nodes", str(self._nodes), "--control", "3"),
            ],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, self._store.nic_control, 3),
            ],
            setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT),
        )
        self._store.nic_pid = pid
        self._nic_started = time.monotonic()
        processes.record(
            self._place, pid, processes.NIC, self._node, f"vmmc-nic of {names.node_name(self._node)}"
        )
        channel.send(self._supervisor, what="nic", pid=pid)
        self._nic_pidfd = os.pidfd_open(pid)
        self._loop.watch(self._nic_pidfd, self._nic_ended)

    def _nic_ended(self) -> None:
        self._loop.unwatch(self._nic_pidfd)
        os.close(self._nic_pidfd)
        pid = self._store.nic_pid
        try:
            how = describe_exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        except ChildProcessError:
            how = "ended (it was a predecessor daemon's)"
        name = names.node_name(self._node)
        if not self._nic_ready and not self._nic_failures:
            # The first one, or one that was never heard of: say why where `up` waits for an answer.
            channel.send(
                self._supervisor, what="failed", why=f"the NIC of {name} {how}{self._nic_last_words()}"
            )
        young = time.monotonic() - self._nic_started < _NIC_YOUNG_S
        self._nic_failures = self._nic_failures + 1 if young else 0
        delay = (
            _NIC_BACKOFF_S[min(self._nic_failures - 1, len(_NIC_BACKOFF_S) - 1)]
            if self._nic_failures > 1
            else 0
        )
        log(f"{name} NIC {pid} {how}; a successor starts {f'in {delay} s' if delay else 'now'}")
        processes.forget(self._place, processes.NIC, self._node, pid)
        if delay:
            self._loop.call_later(delay, self._start_nic)
        else:
            self._start_nic()

    def _nic_last_words(self) -> str:
        path = self._place.logs / f"{names.node_name(self._node)}.nic.log"
        with contextlib.suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if lines:
                return f": {lines[-1]}"
        return ""

    def _take_over(self) -> None:
        """Goes on where a predecessor was killed: the NIC and the programs have noticed nothing."""
        name = names.node_name(self._node)
        for endpoint in self._store.endpoints.values():
            self._indices[endpoint.index] = endpoint.serial
            self._watch_endpoint(endpoint)
        # Segments of a program that the predecessor had not yet told the supervisor of: nobody uses them.
        known = {f"ep{serial}" for serial in self._store.endpoints}
        prefix = names.segment_name(self._place.cluster, self._node, "").removeprefix("/")
        for segment in self._place.segments():
            what = segment.removeprefix(prefix)
            if segment.startswith(prefix) and what.startswith("ep") and what.partition(".")[0] not in known:
                self._unlink(what)
        nic = next(
            (p for p in processes.recorded(self._place, processes.NIC) if p.pid == self._store.nic_pid), None
        )
        pidfd = processes.open_pidfd(nic) if nic else None
        if pidfd is None:
            log(f"{name} daemon takes over from one that died; its NIC is gone too")
            self._start_nic()
            return
        log(f"{name} daemon takes over from one that died: NIC {self._store.nic_pid} goes on")
        self._nic_pidfd = pidfd
        self._nic_started = time.monotonic()
        self._loop.watch(pidfd, self._nic_ended)
        self._nic_ready = True
        self._tell_everything()
        for endpoint in self._store.endpoints.values():
            if not endpoint.replied:
                self._reply(endpoint)
        channel.send(self._supervisor, what="ready")

    def _tell_everything(self) -> None:
        """Tells the NIC of every wire and endpoint; what it knows already changes nothing."""
        self._tell_wires(everything=True)
        for endpoint in self._store.endpoints.values():
            self._tell_nic(self._protocol.CONTROL_ATTACH, endpoint, endpoint.pid)
            for number, descriptor in endpoint.wakers.items():
                self._tell_nic(self._protocol.CONTROL_WAKER, endpoint, number, (descriptor,))
            if endpoint.ending:
                self._tell_nic(self._protocol.CONTROL_DETACH, endpoint)

    def _tell_nic(
        self, kind: int, endpoint: Endpoint, value: int = 0, descriptors: tuple[int, ...] = ()
    ) -> None:
        data = self._protocol.control.pack(
            kind=kind, endpoint=endpoint.index, serial=endpoint.serial, value=value
        )
        # The waiting copy holds descriptors of its own: the endpoint may be gone before it is sent.
        self._outbox.append((data, tuple(os.dup(descriptor) for descriptor in descriptors)))
        self._flush()

    def _tell_wires(self, *, everything: bool = False) -> None:
        """Tells the NIC how wires are to be: those that have changed since it was told last, or all."""
        present = wires.read(self._place, self._node)
        for sender, wire in present.items():
            if not everything and wire == self._wires.get(sender):
                continue
            data = self._protocol.control_wire.pack(
                kind=self._protocol.CONTROL_WIRE, **{"from": sender}, **wire.control()
            )
            self._outbox.append((data, ()))
        self._wires = present
        self._flush()

    def _flush(self) -> None:
        while self._outbox:
            data, descriptors = self._outbox[0]
            try:
                socket.send_fds(self._control, [data], descriptors)
            except BlockingIOError:
                break  # the NIC is slow or gone: go on when there is room
            self._outbox.popleft()
            for descriptor in descriptors:
                os.close(descriptor)
        self._loop.watch(self._control.fileno(), self._hear_nic, self._flush if self._outbox else None)

    def _hear_nic(self) -> None:
        for _ in range(64):  # then let others have their turn
            try:
                message = self._protocol.control.unpack(self._control.recv(4096))
            except BlockingIOError:
                return
            if message is None:
                log(f"{names.node_name(self._node)}: the NIC said something that is no message")
                continue
            if message["kind"] == self._protocol.CONTROL_READY:
                self._nic_is_ready(message["value"])
            elif message["kind"] == self._protocol.CONTROL_EXPELLED:
                expelled = self._store.endpoints.get(message["serial"])
                if expelled is not None:
                    self._detach(expelled, "is not served any more: the NIC's log says why")
            elif message["kind"] == self._protocol.CONTROL_GONE:
                self._forget_endpoint(message["serial"])

    def _nic_is_ready(self, pid: int) -> None:
        if pid != self._store.nic_pid:
            return  # a predecessor's last word
        self._nic_ready = True
        log(f"{names.node_name(self._node)} NIC {pid} is ready")
        self._tell_everything()
        channel.send(self._supervisor, what="ready")

    # ---- programs ----

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log(f"{names.node_name(self._node)} cannot take a connection: {error.strerror}")
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                # The connection stays in the queue and would call again at once.
                self._loop.unwatch(self._listener.fileno())
                self._loop.call_later(0.2, lambda: self._loop.watch(self._listener.fileno(), self._accept))
            return
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid():
            log(f"{names.node_name(self._node)} refused pid {pid} of user {uid}: it is another user's")
            connection.close()
            return
        connection.setblocking(False)
        descriptor = connection.fileno()
        self._sockets[descriptor] = connection
        self._loop.watch(descriptor, lambda: self._hear_newcomer(connection, pid))

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
            self._drop(connection)
            return
        name = names.node_name(self._node)
        if (request["magic"], request["version"]) != (self._protocol.MAGIC, self._protocol.VERSION):
            log(f"{name} refused pid {pid}: its library is of another version ({request['version']})")
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
            log(f"{name} cannot attach pid {pid}: {error.strerror}{hint}")
            self._refuse(connection, error.errno or errno.EIO, needed, free)
            return
        self._tell_nic(self._protocol.CONTROL_ATTACH, endpoint, endpoint.pid)
        self._reply(endpoint)
        command = processes.command_of(pid)
        visits = request["kind"] == self._protocol.VISIT
        if not visits and not (self._place.processes / f"{processes.PROGRAM}-{pid}").exists():
            processes.record(self._place, pid, processes.PROGRAM, self._node, command)
        log(
            f"{name} attached pid {pid} as endpoint {endpoint.index}, serial {endpoint.serial}:"
            f" {command[:200]}"
        )

    def _refuse(self, connection: socket.socket, error: int, needed: int = 0, free: int = 0) -> None:
        with contextlib.suppress(OSError):
            connection.send(
                self._protocol.attach_reply.pack(
                    magic=self._protocol.MAGIC, error=error, needed_bytes=needed, free_bytes=free
                )
            )
        self._drop(connection)

    def _new_endpoint(self, connection: socket.socket, pid: int) -> Endpoint:
        index = next((i for i in range(self._protocol.ENDPOINTS_MAX) if i not in self._indices), None)
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
        channel.send(
            self._supervisor, (endpoint.attach, pidfd), what="endpoint", serial=serial, index=index, pid=pid
        )
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
                segment = posix_ipc.SharedMemory(
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
            self._detach(endpoint, f"could not be answered ({error})")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        endpoint.replied = True
        channel.send(self._supervisor, what="replied", serial=endpoint.serial)

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
            or len(descriptors) != 1
            or request["waker"] > self._protocol.MEMORY
        ):
            log(f"{names.node_name(self._node)}: pid {endpoint.pid} sent a message that is none")
            for descriptor in descriptors:
                os.close(descriptor)
            return
        number, waker = request["waker"], descriptors[0]
        if number in endpoint.wakers:
            os.close(endpoint.wakers[number])
        endpoint.wakers[number] = waker
        channel.send(self._supervisor, (waker,), what="waker", serial=endpoint.serial, number=number)
        self._tell_nic(self._protocol.CONTROL_WAKER, endpoint, number, (waker,))

    def _detach(self, endpoint: Endpoint, how: str) -> None:
        """Its process cannot use it any more: the NIC delivers what was sent and then says GONE."""
        if endpoint.ending:
            return
        endpoint.ending = True
        self._loop.unwatch(endpoint.attach)
        self._loop.unwatch(endpoint.pidfd)
        channel.send(self._supervisor, what="ending", serial=endpoint.serial)
        self._tell_nic(self._protocol.CONTROL_DETACH, endpoint)
        if processes.start_of(endpoint.pid) is None:
            processes.forget(self._place, processes.PROGRAM, self._node, endpoint.pid)
        log(f"{names.node_name(self._node)} pid {endpoint.pid}, endpoint {endpoint.index}, {how}")

    def _forget_endpoint(self, serial: int) -> None:
        endpoint = self._store.endpoints.get(serial)
        if endpoint is None or not endpoint.ending:
            return  # said twice, or too early: a live program's memory is not taken away
        for part in ("app", "nic", "own"):
            self._unlink(f"ep{serial}.{part}")
        del self._store.endpoints[serial]
        del self._indices[endpoint.index]
        self._sockets.pop(endpoint.attach).detach()
        endpoint.close()
        channel.send(self._supervisor, what="gone", serial=serial)

    # ---- the supervisor ----

    def _hear_supervisor(self) -> None:
        """A wire has changed; or it was killed, then traffic and attaching go on, and `down` still works."""
        try:
            received = channel.receive(self._supervisor)
        except BlockingIOError:
            return
        if received is not None:
            self._tell_wires()
            return
        self._loop.unwatch(self._supervisor.fileno())
        log(f"{names.node_name(self._node)}: the supervisor is gone; nobody restarts this daemon now")


def peer_pidfd(connection: socket.socket, pid: int) -> int:
    """A descriptor of the process that connected."""
    try:
        return struct.unpack("i", connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0]  # type: ignore[no-any-return]
    except OSError as error:
        if error.errno not in {errno.ENOPROTOOPT, errno.EINVAL}:
            raise
    return os.pidfd_open(pid)


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
    protocol: Protocol,
    sizes: dict[str, int],
) -> None:
    """What the child of the supervisor's fork does; never returns."""
    name = names.node_name(store.node)
    status = 1
    try:
        set_title(f"vmmc-emu: {place.cluster} {name} daemon", f"{name} daemon")
        path: Path = place.logs / f"{name}.daemon.log"
        output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        Daemon(place, nodes, store, supervisor, protocol, sizes).run()
        status = 0
    except BaseException as error:  # the boundary of the process: whatever it is must be told
        log(f"{name} daemon fails: {type(error).__name__}: {error}")
        channel.send(supervisor, what="failed", why=f"the daemon of {name}: {error}")
        if not isinstance(error, (OSError, posix_ipc.Error)):
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(status)
