"""Does what it is told with a TCP pair, and says what each call gave and what was ready (tests/differential).

Reads one JSON list of calls a line, each [side, name, arguments...], and answers each with a line: a list of
what came of them.  Every line gets a new pair on 127.0.0.1.  A call that makes something arrive is followed
by a wait for just that, so that what the next call meets does not depend on speed.
"""

from __future__ import annotations

import array
import errno
import fcntl
import json
import os
import select
import socket
import struct
import sys
import termios
from collections.abc import Callable
from typing import Any

NAMES = ("IN", "OUT", "PRI", "ERR", "HUP", "RDHUP", "NVAL")
ALL = select.POLLIN | select.POLLOUT | select.POLLPRI | select.POLLRDHUP
# Buffers differ in size, on purpose: no more than fits into any.
UNREAD_MAX = 6000
PATTERN = bytes(i * 7 % 251 for i in range(251 * 100))
WAIT_MS = 5000
CLOSE = b"\x07"  # TCP's state


def spell(events: int) -> str:
    return "|".join(name for name in NAMES if events & getattr(select, f"POLL{name}")) or "-"


def poll(fd: int, mask: int, timeout_ms: int = 0) -> int:
    waiting = select.poll()
    waiting.register(fd, mask)
    return dict(waiting.poll(timeout_ms)).get(fd, 0)


class Side:
    """One end of the pair, and what is known of it."""

    def __init__(self, sock: socket.socket) -> None:
        self.peer: Side
        self.sock = sock
        self.fds = [sock.detach()]  # the last is the one in use; the others are duplicates of it
        self.sent = 0
        self.taken = 0
        self.ended = False  # said that it will send no more
        self.reset = False

    @property
    def gone(self) -> bool:
        return not self.fds

    @property
    def unread(self) -> int:
        return self.peer.sent - self.taken


class Pair:
    """Two connected sockets, non-blocking, and the calls on them."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            one = socket.create_connection(listener.getsockname())
            other, _ = listener.accept()
        for each in (one, other):
            each.setblocking(False)
        self.sides = Side(one), Side(other)
        self.sides[0].peer, self.sides[1].peer = reversed(self.sides)

    def close(self) -> None:
        for side in self.sides:
            for fd in side.fds:
                os.close(fd)

    # ---- what arrives ----

    def wait(self, side: Side, events: int, what: str) -> None:
        """Until the side has one of these events, which must come."""
        if side.fds and not poll(side.fds[0], events, WAIT_MS) & events:
            raise TimeoutError(f"{what} never came")

    def wait_for_both_ends(self) -> None:
        """TCP's state is CLOSE once each end knows of the other's, which it learns a little later."""
        for side in self.sides:
            if side.fds:
                with socket.socket(fileno=os.dup(side.fds[0])) as sock:
                    for _ in range(WAIT_MS):
                        if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == CLOSE:
                            break
                        select.select([], [], [], 0.001)
                    else:
                        raise TimeoutError("CLOSE never came")

    def after_send(self, side: Side, count: int) -> int:
        peer = side.peer
        if peer.gone or peer.reset:
            # Nobody is there to receive it: a reset comes back.
            if count and not side.reset:
                self.wait(side, select.POLLHUP, "the reset")
                side.reset = True
            return count
        side.sent += count
        if count:
            for _ in range(WAIT_MS):
                if self.queued(peer.fds[0]) == peer.unread:
                    break
                select.select([], [], [], 0.001)
            else:
                raise TimeoutError(f"{peer.unread} bytes never came: {self.queued(peer.fds[0])}")
        return count

    @staticmethod
    def queued(fd: int) -> int:
        buffer = array.array("i", [0])
        fcntl.ioctl(fd, termios.FIONREAD, buffer)
        return buffer[0]

    def taken(self, side: Side, data: bytes, flags: int) -> list[object]:
        offset = side.taken
        assert data == PATTERN[offset % 251 :][: len(data)], "wrong bytes"
        if not flags & socket.MSG_PEEK:
            side.taken += len(data)
        return [len(data)]

    # ---- the calls ----

    def send(self, side: Side, fd: int, length: int, how: str, flags: int) -> object:
        if length + side.peer.unread > UNREAD_MAX:
            return "(full)"
        data = PATTERN[side.sent % 251 :][:length]
        sock = socket.socket(fileno=os.dup(fd))
        with sock:
            if how == "write":
                count = os.write(fd, data)
            elif how == "writev":
                count = os.writev(fd, [data[:3], b"", data[3:50], data[50:]])
            elif how == "sendmsg":
                count = sock.sendmsg([data[:1], data[1:70], b"", data[70:]], [], flags)
            elif how == "sendto":
                count = sock.sendto(data, flags, ("127.0.0.1", 9))  # the address is ignored
            else:
                count = sock.send(data, flags)
        return self.after_send(side, count)

    def recv(self, side: Side, fd: int, length: int, how: str, flags: int) -> object:
        sock = socket.socket(fileno=os.dup(fd))
        with sock:
            if how == "read":
                return self.taken(side, os.read(fd, length), 0)
            if how == "readv":
                pieces = [bytearray(length // 3), bytearray(0), bytearray(length - length // 3)]
                count = os.readv(fd, pieces)
                return self.taken(side, b"".join(pieces)[:count], 0)
            if how == "recvmsg":
                data, ancillary, said, address = sock.recvmsg(length, 0, flags)
                return [*self.taken(side, data, flags), len(ancillary), said, address is None]
            if how == "recvfrom":
                data, address = sock.recvfrom(length, flags)
                return [*self.taken(side, data, flags), address is None]
            return self.taken(side, sock.recv(length, flags), flags)

    def shutdown(self, side: Side, fd: int, how: int) -> object:
        with socket.socket(fileno=os.dup(fd)) as sock:
            sock.shutdown(how)
        if how != socket.SHUT_RD and not side.ended:
            side.ended = True
            if not side.peer.gone:
                self.wait(side.peer, select.POLLRDHUP, "the end")
            if side.peer.ended:
                self.wait_for_both_ends()
        return 0

    def close_one(self, side: Side, fd: int) -> object:
        with socket.socket(fileno=os.dup(fd)) as sock:
            on, seconds = struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        resets = side.unread > 0 or (on and not seconds)
        os.close(side.fds.pop())
        if not side.fds and not side.peer.gone and not side.reset:
            if resets and not (side.ended and side.peer.ended):
                self.wait(side.peer, select.POLLHUP | select.POLLERR, "the reset")
                side.peer.reset = True
            else:
                self.wait(side.peer, select.POLLRDHUP, "the end")
        if not side.fds:
            side.ended = True
            if side.peer.ended and not side.peer.reset:
                self.wait_for_both_ends()
        return 0

    def dup(self, side: Side, fd: int) -> object:
        side.fds.append(os.dup(fd))
        return len(side.fds)

    def ready(self, side: Side, fd: int, mask: int) -> object:
        return spell(poll(fd, mask))

    def selected(self, side: Side, fd: int) -> object:
        return [len(each) for each in select.select([fd], [fd], [fd], 0)]

    def epolled(self, side: Side, fd: int, mask: int) -> object:
        with select.epoll() as ep:
            ep.register(fd, mask)
            return [spell(events) for _, events in ep.poll(0)]

    def getsockopt(self, side: Side, fd: int, level: int, option: int) -> object:
        with socket.socket(fileno=os.dup(fd)) as sock:
            return sock.getsockopt(level, option)

    def setsockopt(self, side: Side, fd: int, level: int, option: int, value: Any) -> object:
        with socket.socket(fileno=os.dup(fd)) as sock:
            if isinstance(value, list):
                value = struct.pack("ii", *value)
            sock.setsockopt(level, option, value)
            return 0

    def unread(self, side: Side, fd: int) -> object:
        return self.queued(fd)

    def names(self, side: Side, fd: int) -> object:
        with socket.socket(fileno=os.dup(fd)) as sock:
            return [sock.getsockname()[0], sock.getpeername()[0]]

    def again(self, side: Side, fd: int, what: str) -> object:
        """What only a new socket can do."""
        if side.reset or (side.ended and side.peer.ended):
            return "(ended)"  # on Linux a new one, in part: named in test_calls.py
        with socket.socket(fileno=os.dup(fd)) as sock:
            if what == "listen":
                sock.listen()
            elif what == "accept":
                sock.accept()
            elif what == "bind":
                sock.bind(("127.0.0.1", 0))
            else:
                sock.connect(("127.0.0.1", 9))
        return 0

    def seek(self, side: Side, fd: int) -> object:
        return os.lseek(fd, 0, os.SEEK_SET)

    def do(self, which: int, name: str, arguments: list[Any]) -> object:
        side = self.sides[which]
        if side.gone:
            return "(closed)"
        call: Callable[..., object] = getattr(self, name)
        try:
            return call(side, side.fds[-1], *arguments)
        except TimeoutError as error:
            return str(error) or "ETIMEDOUT"
        except OSError as error:
            return errno.errorcode[error.errno or 0]


def main() -> None:
    for line in sys.stdin:
        pair = Pair()
        done = [pair.do(side, name, arguments) for side, name, *arguments in json.loads(line)]
        print(json.dumps(done), flush=True)
        pair.close()


main()
