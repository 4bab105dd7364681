"""Does what it is told with stream sockets; says what each call gave and what it left (tests/differential).

Reads a JSON list a line, [name, arguments...], and answers each with a line: what came of the call, and for
each socket how it stands: what poll reports, TCP's state, bytes to read, what a blocked thread was told.
Sockets have numbers; "look" only looks again, "end" ends everything.  Nothing here knows what it runs over.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import socket
import struct
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

NAMES = ("IN", "OUT", "PRI", "ERR", "HUP", "RDHUP", "NVAL", "RDNORM", "WRNORM")
ALL = select.POLLIN | select.POLLOUT | select.POLLPRI | select.POLLRDHUP
SOCKETS = 8
# Buffers differ in size: no more than fits into any, but where a call is there to fill them.
UNREAD_MAX = 6000
PATTERN = bytes(i * 7 % 251 for i in range(251 * 300))  # more than the longest piece that is read
MORE_THAN_FITS = memoryview(PATTERN * 150)
WAIT_S = 5.0
# TCP's states, where they matter
ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 1, 4, 5, 7, 8, 9, 10, 11
LIBRARY = ctypes.CDLL(None, use_errno=True)
SYS_FUTEX = "202"  # how a thread waits for the interpreter


def spell(events: int) -> str:
    return "|".join(name for name in NAMES if events & getattr(select, f"POLL{name}")) or "-"


def host(how: str) -> str:
    return {"any4": "0.0.0.0", "any6": "::", "anymapped": "::ffff:0.0.0.0", "4": "127.0.0.1", "6": "::1",
            "mapped": "::ffff:127.0.0.1"}[how]  # fmt: skip


class Blocked:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.result: object = None
        self.call = call
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            self.result = self.call()
        except OSError as error:
            self.result = errno.errorcode[error.errno or 0]

    @property
    def asleep(self) -> bool:
        """In its call, and not waiting for the interpreter's lock."""
        with contextlib.suppress(OSError):
            task = f"/proc/self/task/{self.thread.native_id}"
            with open(f"{task}/stat", encoding="ascii") as file:
                state = file.read().rsplit(")", 1)[1].split()[0]
            with open(f"{task}/syscall", encoding="ascii") as file:
                return state == "S" and file.read().split()[0] != SYS_FUTEX
        return False

    def settle(self) -> None:
        """Until it has ended, or sleeps."""
        end = time.monotonic() + WAIT_S
        while self.result is None and not self.asleep and time.monotonic() < end:
            select.select([], [], [], 0.00005)  # lets go of the interpreter's lock


class Socket:
    """One of the numbered sockets, and what is known of it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.family = socket.AF_INET
        self.fds: list[int] = []  # the last is the one in use; the others are duplicates of it
        self.begin()
        self.backlog = 0
        self.blocked: Blocked | None = None
        self.reserved = False  # for what a thread will accept

    def begin(self) -> None:
        """A connection begins."""
        self.sent = self.taken = 0
        self.peer: Socket | None = None
        self.deaf = False  # has said that it reads no more
        self.filled = False  # its buffers were filled: how much is under way is nobody's business

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[socket.socket]:
        sock = socket.socket(self.family, socket.SOCK_STREAM, 0, fileno=self.fds[-1])
        try:
            yield sock
        finally:
            sock.detach()

    def block(self, on: bool) -> None:
        os.set_blocking(self.fds[-1], on)

    @property
    def info(self) -> tuple[int, int]:
        """TCP's state, and how many connections wait to be accepted."""
        with self.borrowed() as sock:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
        return info[0], struct.unpack_from("I", info, 24)[0]

    def ioctl(self, request: int) -> int:
        buffer = array.array("i", [0])
        fcntl.ioctl(self.fds[-1], request, buffer)
        return buffer[0]

    @property
    def to_read(self) -> int:
        with contextlib.suppress(OSError):
            return self.ioctl(termios.FIONREAD)
        return -1

    @property
    def unsent(self) -> int:
        """Or not acknowledged."""
        with contextlib.suppress(OSError):
            return self.ioctl(termios.TIOCOUTQ)
        return 0

    @property
    def is_held_up(self) -> bool:
        return self.filled and self.info[0] != CLOSE


class Machine:
    """The sockets, two epoll sets, and the calls."""

    def __init__(self) -> None:
        self.sockets = [Socket(number) for number in range(SOCKETS)]
        self.sets = [select.epoll(), select.epoll()]
        self.members: list[dict[int, int]] = [{}, {}]
        self.ports: dict[int, int] = {0: 0}
        self.wake = os.pipe()
        for each in self.sets:
            each.register(self.wake[0], select.EPOLLIN)

    @property
    def open(self) -> list[Socket]:
        return [s for s in self.sockets if s.fds]

    def end(self) -> object:
        """Everything is closed; says which threads could not be woken."""
        os.write(self.wake[1], b"x")
        for s in self.open:
            if s.blocked:
                with contextlib.suppress(OSError), s.borrowed() as sock:
                    sock.shutdown(socket.SHUT_RDWR)
        stuck = []
        for s in self.sockets:
            if s.blocked:
                s.blocked.thread.join(WAIT_S)
                if s.blocked.thread.is_alive():
                    stuck.append(s.number)
            for fd in s.fds:
                os.close(fd)
        for each in self.sets:
            each.close()
        for fd in self.wake:
            os.close(fd)
        return stuck

    # ---- how everything stands ----

    def settle(self) -> None:
        """Until nothing is under way that a kernel does later: acknowledgements, woken threads."""
        for _ in range(3):
            under_way = [s for s in self.open if s.info[0] in (FIN_WAIT1, CLOSING, LAST_ACK) or s.unsent]
            if not under_way:
                break
            for s in self.open:
                with contextlib.suppress(OSError), s.borrowed() as sock:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        for s in self.sockets:
            if s.blocked:
                s.blocked.settle()

    def stands(self, s: Socket) -> str:
        waiting = select.poll()
        waiting.register(s.fds[-1], ALL)
        ready = dict(waiting.poll(0)).get(s.fds[-1], 0)
        state, accepts = s.info
        if s.is_held_up:
            ready &= ~select.POLLOUT
        unread = str(s.to_read)
        if s.peer and s.peer.filled and s.to_read > 0:
            unread = "some"
        state = FIN_WAIT2 if state == FIN_WAIT1 else state
        words = [spell(ready), f"state {state}", f"unread {unread}"]
        if state == LISTEN:
            words[2] = f"accepts {accepts}"
        return " ".join(words)

    def look(self) -> list[str]:
        self.settle()
        words = []
        for s in self.sockets:
            each = self.stands(s) if s.fds else "closed"
            if s.blocked:
                told = s.blocked.result
                each += " blocked" if told is None else f" was told {json.dumps(told)}"
            words.append(each)
        return words

    # ---- making ----

    def put(self, s: Socket, sock: socket.socket) -> None:
        s.family = socket.AddressFamily(sock.family)
        sock.setblocking(False)
        s.fds = [sock.detach()]
        s.begin()

    def address(self, s: Socket, how: str, port: int) -> tuple[str, int]:
        if s.family == socket.AF_INET and how not in ("4", "any4"):
            how = "4" if how in ("6", "mapped") else "any4"
        if s.family == socket.AF_INET6:
            how = {"4": "mapped", "any4": "anymapped"}.get(how, how)
        return host(how), port

    def port_of(self, number: int) -> int:
        s = self.sockets[number]
        if not s.fds:
            return 0
        with s.borrowed() as sock:
            port: int = sock.getsockname()[1]
            return port

    def name(self, address: Any) -> object:
        """An address; ports, which the system chose, by the order in which they appeared."""
        return [address[0], self.ports.setdefault(address[1], len(self.ports))]

    def new(self, s: Socket, family: int) -> object:
        if s.fds or s.reserved:
            return "(taken)"
        self.put(s, socket.socket(family, socket.SOCK_STREAM))
        return 0

    def pair(self, s: Socket, other: int, family: int) -> object:
        o = self.sockets[other]
        if s is o or s.fds or o.fds or s.reserved or o.reserved:
            return "(taken)"
        loopback = host("6" if family == socket.AF_INET6 else "4")
        with socket.create_server((loopback, 0), family=family) as listener:
            one = socket.create_connection(listener.getsockname()[:2])
            two, _ = listener.accept()
        self.put(s, one)
        self.put(o, two)
        s.peer, o.peer = o, s
        return 0

    def bind(self, s: Socket, how: str, port_of: int) -> object:
        with s.borrowed() as sock:
            sock.bind(self.address(s, how, 0 if port_of == s.number else self.port_of(port_of)))
        return 0

    def listen(self, s: Socket, backlog: int) -> object:
        with s.borrowed() as sock:
            sock.listen(backlog)
        s.backlog = backlog
        return 0

    def connect(self, s: Socket, to: int, how: str) -> object:
        port = self.port_of(to)
        if port and port == self.port_of(s.number):
            return "(itself)"
        listeners = [o for o in self.open if o.info[0] == LISTEN and self.port_of(o.number) == port]
        if len(listeners) > 1:
            return "(which?)"
        if listeners and listeners[0].info[1] > listeners[0].backlog:
            return "(full)"
        try:
            with s.borrowed() as sock:
                sock.connect(self.address(s, how, port or 9))
        except BlockingIOError as error:
            if error.errno == errno.EINPROGRESS:
                s.begin()
            raise
        return 0

    def disconnect(self, s: Socket) -> object:
        if s.filled:
            return "(full)"
        unspecified = struct.pack("=H14x", socket.AF_UNSPEC)
        if LIBRARY.connect(s.fds[-1], unspecified, len(unspecified)) < 0:
            raise OSError(ctypes.get_errno(), "connect")
        if s.peer:
            s.peer.peer = None
        s.begin()
        return 0

    def accept(self, s: Socket, into: int) -> object:
        n = self.sockets[into]
        if n.fds or n is s:
            return "(taken)"
        with s.borrowed() as sock:
            fd, address = sock._accept()  # type: ignore[attr-defined]
        self.put(n, socket.socket(s.family, socket.SOCK_STREAM, 0, fileno=fd))
        for each in self.open:
            if each is n or each.info[0] == LISTEN or self.port_of(each.number) != address[1]:
                continue
            with contextlib.suppress(OSError), each.borrowed() as sock, n.borrowed() as accepted:
                if sock.getpeername()[1] == accepted.getsockname()[1]:
                    each.peer, n.peer = n, each
        return [address[0], n.peer.number if n.peer else None]

    # ---- bytes ----

    def send(self, s: Socket, length: int, how: str, flags: int) -> object:
        if length + s.sent - (s.peer.taken if s.peer else 0) > UNREAD_MAX or s.is_held_up:
            return "(full)"
        data = PATTERN[s.sent % 251 :][:length]
        fd = s.fds[-1]
        with s.borrowed() as sock:
            if how == "write":
                count = os.write(fd, data)
            elif how == "sendfile":
                with tempfile.TemporaryFile() as file:
                    file.write(data)
                    file.flush()
                    count = os.sendfile(fd, file.fileno(), 0, length)
            elif how == "writev":
                count = os.writev(fd, [data[:3], b"", data[3:50], data[50:]])
            elif how == "many":
                count = sock.sendmsg([data[i : i + 7] for i in range(0, len(data), 7)], [], flags)
            elif how == "sendmsg":
                count = sock.sendmsg([data[:1], data[1:70], b"", data[70:]], [], flags)
            elif how == "sendto":
                ignored = self.address(s, "6" if s.family == socket.AF_INET6 else "4", 9)
                count = sock.sendto(data, flags, ignored)
            else:
                count = sock.send(data, flags)
        s.sent += count
        return count

    def took(self, s: Socket, data: bytes, flags: int) -> list[object]:
        if not flags & socket.MSG_TRUNC:
            assert data == PATTERN[s.taken % 251 :][: len(data)], "wrong bytes"
        if not flags & socket.MSG_PEEK:
            s.taken += len(data)
            if s.peer and s.taken == s.peer.sent:
                s.peer.filled = False
        return [len(data)]

    def recv(self, s: Socket, length: int, how: str, flags: int) -> object:
        if s.peer and s.peer.filled and s.to_read > 0:
            return "(full)"
        fd = s.fds[-1]
        with s.borrowed() as sock:
            if how == "read":
                return self.took(s, os.read(fd, length), 0)
            if how == "readv":
                pieces = [bytearray(length // 3), bytearray(0), bytearray(length - length // 3)]
                count = os.readv(fd, pieces)
                return self.took(s, b"".join(pieces)[:count], 0)
            if how == "many":
                pieces = [bytearray(5) for _ in range(0, length, 5)]
                count, ancillary, said, address = sock.recvmsg_into(pieces, 0, flags)
                return [*self.took(s, b"".join(pieces)[:count], flags), len(ancillary), said, address is None]
            if how == "recvmsg":
                data, ancillary, said, address = sock.recvmsg(length, 0, flags)
                return [*self.took(s, data, flags), len(ancillary), said, address is None]
            if how == "recvfrom":
                data, address = sock.recvfrom(length, flags)
                return [*self.took(s, data, flags), address is None]
            return self.took(s, sock.recv(length, flags), flags)

    def fill(self, s: Socket) -> object:
        """Sends until there is no room."""
        if not s.peer or not s.peer.fds or s.peer.deaf or s.is_held_up:
            return "(alone)"
        try:
            while True:
                at = s.sent % 251
                with s.borrowed() as sock:
                    s.sent += sock.send(PATTERN[at : at + 16384])
        except BlockingIOError:
            s.filled = True
            return "full"

    def drain(self, s: Socket) -> object:
        """Reads all that was sent and will be."""
        if not s.peer or not s.peer.filled:
            return "(empty)"
        end = time.monotonic() + WAIT_S
        while s.taken < s.peer.sent or (s.peer.blocked and s.peer.blocked.result is None and not s.blocked):
            with s.borrowed() as sock:
                try:
                    data = sock.recv(65536)
                except BlockingIOError:
                    if time.monotonic() > end:
                        return f"{s.peer.sent - s.taken} bytes never came"
                    select.select([], [], [], 0.0001)
                    continue
            if not data:
                return "end" if s.taken == s.peer.sent else f"end, {s.peer.sent - s.taken} bytes early"
            self.took(s, data, 0)
            if s.taken == s.peer.sent and s.peer.blocked:
                s.peer.blocked.settle()
        return "all"

    # ---- in a thread, and with a time ----

    def block(self, s: Socket, name: str, *arguments: Any) -> object:
        """The call, blocking, in a thread."""
        if s.blocked and s.blocked.result is None:
            return "(busy)"
        s.blocked = None
        calls: dict[str, Callable[..., object]] = {
            "recv": self.recv, "send": self.blocked_send, "accept": self.accept,
            "connect": self.connect, "poll": self.blocked_poll,
            "select": self.blocked_select, "epoll": self.blocked_epoll,
        }  # fmt: skip
        if name == "recv" and s.peer and s.peer.filled:
            return "(full)"
        if name == "send" and not (s.peer and s.peer.fds):
            return "(alone)"
        if name == "accept":
            into = self.sockets[arguments[0]]
            if into.fds or into.reserved or into is s:
                return "(taken)"
            into.reserved = True
        s.block(True)
        s.blocked = Blocked(lambda: calls[name](s, *arguments))
        s.blocked.settle()
        s.block(False)
        return 0

    def blocked_send(self, s: Socket) -> object:
        """More than any buffers take; of part of it, how much is their business."""
        if s.is_held_up:
            return "(full)"
        at = s.sent % 251
        s.filled = s.peer is not None
        with s.borrowed() as sock:
            count = sock.send(MORE_THAN_FITS[at : at + len(MORE_THAN_FITS) - 251])
        s.sent += count
        return "all" if count == len(MORE_THAN_FITS) - 251 else "part"

    def blocked_poll(self, s: Socket, mask: int, alone: bool) -> object:
        waiting = select.poll()
        waiting.register(s.fds[-1], mask)
        if not alone:
            waiting.register(self.wake[0], select.POLLIN)
        return spell(dict(waiting.poll()).get(s.fds[-1], 0))

    def blocked_select(self, s: Socket, which: int) -> object:
        readers, writers, others = ([s.fds[-1]] if which == n else [] for n in range(3))
        return [len(each) for each in select.select([self.wake[0], *readers], writers, others)]

    def blocked_epoll(self, s: Socket, which: int) -> object:
        return self.waited(which, -1)

    def timed(self, s: Socket, name: str, *arguments: Any) -> object:
        """The call, blocking for a little."""
        if s.blocked and s.blocked.result is None:
            return "(busy)"
        on, off = struct.pack("ll", 0, 2000), struct.pack("ll", 0, 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            with s.borrowed() as sock:
                sock.setsockopt(socket.SOL_SOCKET, option, on)
        s.block(True)
        try:
            return self.blocked_send(s) if name == "send" else getattr(self, name)(s, *arguments)
        finally:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                with s.borrowed() as sock:
                    sock.setsockopt(socket.SOL_SOCKET, option, off)
            s.block(False)

    # ---- ends ----

    def shutdown(self, s: Socket, how: int) -> object:
        with s.borrowed() as sock:
            sock.shutdown(how)
        s.deaf = s.deaf or how != socket.SHUT_WR
        return self.ended(s, False)

    def resets(self, s: Socket) -> bool:
        """What its close is."""
        with s.borrowed() as sock:
            on, seconds = struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        return s.to_read > 0 or (on and not seconds)

    def ended(self, s: Socket, by_reset: bool) -> object:
        """An end behind full buffers arrives when there is room for it: they are emptied."""
        return self.drain(s.peer) if s.filled and s.peer and s.peer.fds and not by_reset else 0

    def close(self, s: Socket) -> object:
        if s.blocked and s.blocked.result is None:
            return "(busy)"
        with s.borrowed() as sock:
            on, seconds = struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        if on and seconds and s.is_held_up:
            return "(lingers)"
        resets = self.resets(s)
        os.close(s.fds.pop())
        return 0 if s.fds else self.ended(s, resets)

    def dup(self, s: Socket) -> object:
        s.fds.append(os.dup(s.fds[-1]))
        return len(s.fds)

    def dup2(self, s: Socket, over: int) -> object:
        o = self.sockets[over]
        if not o.fds or o is s or (o.blocked and o.blocked.result is None):
            return "(none)"
        resets = self.resets(o)
        fd = o.fds.pop()
        os.dup2(s.fds[-1], fd)
        s.fds.append(fd)
        for members in self.members:
            members.pop(fd, None)
        return 0 if o.fds else self.ended(o, resets)

    # ---- readiness ----

    def seen(self, s: Socket, events: int) -> int:
        """Without what buffer sizes decide."""
        return events & ~(select.POLLOUT | select.POLLWRNORM) if s.fds and s.is_held_up else events

    def ready(self, s: Socket, mask: int) -> object:
        waiting = select.poll()
        waiting.register(s.fds[-1], mask)
        return spell(self.seen(s, dict(waiting.poll(0)).get(s.fds[-1], 0)))

    def selected(self, s: Socket) -> object:
        sets = [s.fds[-1]], [] if s.is_held_up else [s.fds[-1]], [s.fds[-1]]
        return [len(each) for each in select.select(*sets, 0)]

    def control(self, s: Socket, which: int, what: str, events: int) -> object:
        fd = s.fds[-1]
        if what == "unregister":
            self.sets[which].unregister(fd)
        else:
            before = self.members[which].get(fd)
            self.members[which][fd] = s.number  # a thread may be told of it at once
            try:
                getattr(self.sets[which], what)(fd, events)
            except OSError:
                if before is not None:
                    self.members[which][fd] = before
                raise
        return 0

    def waited(self, which: int, seconds: float) -> object:
        found = []
        for fd, events in self.sets[which].poll(seconds, 64):
            if fd == self.wake[0]:
                continue
            number = self.members[which].get(fd, -1)
            seen = self.seen(self.sockets[number], events)
            if seen:
                found.append([number, spell(seen)])
        return sorted(found)

    def wait(self, s: Socket, which: int) -> object:
        return self.waited(which, 0)

    # ---- what it is ----

    def getsockopt(self, s: Socket, level: int, option: int, length: int) -> object:
        with s.borrowed() as sock:
            value = sock.getsockopt(level, option, length) if length else sock.getsockopt(level, option)
            return value if isinstance(value, int) else value.hex()

    def setsockopt(self, s: Socket, level: int, option: int, value: Any) -> object:
        with s.borrowed() as sock:
            sock.setsockopt(level, option, bytes.fromhex(value) if isinstance(value, str) else value)
        return 0

    def ioctl(self, s: Socket, request: int) -> object:
        if s.filled or (s.peer and s.peer.filled):
            return "(full)"
        if request == termios.TIOCOUTQ and s.info[0] == CLOSE:
            return "(over)"  # a difference of sequence numbers, of which nothing is left
        end = time.monotonic() + WAIT_S
        while request == termios.TIOCOUTQ and s.unsent and time.monotonic() < end:
            self.settle()  # the end counts as well, until it is acknowledged
        return s.ioctl(request)

    def status(self, s: Socket) -> object:
        return [fcntl.fcntl(s.fds[-1], command) for command in (fcntl.F_GETFL, fcntl.F_GETFD)]

    def urgent(self, s: Socket) -> object:
        with s.borrowed() as sock:
            return len(sock.recv(1, socket.MSG_OOB))

    def own_name(self, s: Socket) -> object:
        with s.borrowed() as sock:
            return self.name(sock.getsockname())

    def peer_name(self, s: Socket) -> object:
        with s.borrowed() as sock:
            return self.name(sock.getpeername())

    def seek(self, s: Socket) -> object:
        return os.lseek(s.fds[-1], 0, os.SEEK_SET)

    def do(self, name: str, which: int, arguments: list[Any]) -> object:
        s = self.sockets[which]
        if not s.fds and name not in ("new", "pair", "wait"):
            return "(closed)"
        call: Callable[..., object] = getattr(self, name)
        try:
            return call(s, *arguments)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        except AssertionError as error:
            return str(error)


def main() -> None:
    machine = Machine()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        if name == "end":
            answer = [machine.end(), []]
            machine = Machine()
        elif name == "look":
            answer = [None, machine.look()]
        else:
            result = machine.do(name, arguments[0], arguments[1:])
            answer = [result, machine.look()]
        print(json.dumps(answer), flush=True)


main()
