"""Random steps on stream sockets watched by epoll, poll and select; prints what each step gave.

    python readiness.py SEED STEPS

Run once over the kernel and once on a node, with the same seed, the two transcripts must be equal.  After
each step it waits until its consequences have arrived, which the kernel's loopback does by itself.

Odd seeds watch edges, and then nothing is shut down or closed: an edge-triggered set hears of TCP's own
states then (an acknowledged FIN, say), as Linux may tell it any number of times.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import select
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable

FLAGS = {
    "IN": select.EPOLLIN,
    "OUT": select.EPOLLOUT,
    "RDHUP": select.EPOLLRDHUP,
    "ERR": select.EPOLLERR,
    "HUP": select.EPOLLHUP,
    "PRI": select.EPOLLPRI,
    "RDNORM": select.EPOLLRDNORM,
    "WRNORM": select.EPOLLWRNORM,
}
TIMEOUT_S = 10.0


def spell(events: int) -> str:
    """Events by name."""
    return "|".join(name for name, bit in FLAGS.items() if events & bit) or "-"


def settle(condition: Callable[[], bool]) -> None:
    """Waits until what a step must bring about has come about."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("a step's consequences did not arrive")
        os.sched_yield()


class Side:
    """One end of a connection, and what we know must have arrived there."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.sock, self.name = sock, name
        self.number = sock.fileno()
        self.other: Side
        self.unread = 0
        self.ended = False  # the peer will send no more
        self.closed = False
        self.reset = False  # by the peer: what is left to read does not matter any more

    def waiting(self) -> int:
        count: int = struct.unpack("i", fcntl.ioctl(self.sock.fileno(), termios.FIONREAD, b"\0\0\0\0"))[0]
        return count

    def over(self) -> bool:
        """Both ends of the stream have been sent: what TCP makes of a call then is not of interest here."""
        return self.ended and self.other.ended

    def settled(self) -> bool:
        """What was sent has arrived here, end of file included."""
        if self.closed:
            return True
        if self.reset:
            poll = select.poll()
            poll.register(self.sock, 0)
            return bool(poll.poll(0))
        if self.waiting() != self.unread:
            return False
        if not self.ended:
            return True
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        return bool(poll.poll(0))


class Run:
    """One sequence of steps."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.edges = seed % 2 == 1
        self.sides: list[Side] = []
        self.epolls = [select.epoll(), select.epoll()]
        self.pipe = os.pipe()
        self.names: dict[int, str] = {}
        self.members: list[set[int]] = [set(), set()]
        self.listener = socket.create_server(("127.0.0.1", 0))
        for number in range(3):
            self.connect(number)
        self.epolls[0].register(self.pipe[0], select.EPOLLIN)
        self.names[self.pipe[0]] = "pipe"
        self.piped = 0
        self.nested = False

    def connect(self, number: int) -> None:
        client = socket.create_connection(self.listener.getsockname())
        server, _ = self.listener.accept()
        a, b = Side(client, f"c{number}"), Side(server, f"s{number}")
        a.other, b.other = b, a
        for side in (a, b):
            side.sock.setblocking(False)
            self.sides.append(side)
            self.names[side.number] = side.name

    def say(self, *words: object) -> None:
        print(*words, flush=False)

    def step(self) -> None:
        open_sides = [side for side in self.sides if not side.closed and not side.reset]
        name = self.random.choice(
            3 * ["send"]
            + 2 * ["recv"]
            + 3 * ["ctl"]
            + 4 * ["wait"]
            + ["recv_all", "poll", "select", "shutdown", "close", "fill_pipe", "nest"]
        )
        getattr(self, name)(self.random.choice(open_sides) if open_sides else None)
        for side in self.sides:
            settle(side.settled)

    def send(self, side: Side | None) -> None:
        if side is None:
            return
        size = self.random.choice([1, 10, 1000])
        try:
            sent = side.sock.send(b"x" * size)
        except OSError as error:
            self.say("send", side.name, errno.errorcode[error.errno or 0])
            return
        if side.other.closed:
            side.reset = True
        side.other.unread += sent
        self.say("send", side.name, sent)

    def take(self, side: Side | None, size: int) -> None:
        if side is None:
            return
        try:
            got = side.sock.recv(size)
        except OSError as error:
            self.say("recv", side.name, errno.errorcode[error.errno or 0])
            return
        side.unread -= len(got)
        self.say("recv", side.name, len(got))

    def recv(self, side: Side | None) -> None:
        self.take(side, self.random.choice([1, 5, 100]))

    def recv_all(self, side: Side | None) -> None:
        self.take(side, 1 << 20)

    def ctl(self, side: Side | None) -> None:
        if side is None:
            return
        which = self.random.randrange(2)
        what = self.random.choice(["register", "register", "modify", "unregister"])
        events = self.random.choice([1, 4, 5, 5, 0, select.EPOLLRDHUP, 1 | select.EPOLLRDHUP])
        events |= self.random.choice([0, select.EPOLLET if self.edges else 0, select.EPOLLONESHOT])
        try:
            if what == "unregister":
                self.epolls[which].unregister(side.number)
            else:
                getattr(self.epolls[which], what)(side.number, events)
            answer = "ok"
        except OSError as error:
            answer = errno.errorcode[error.errno or 0]
        self.say(what, which, side.name, hex(events), answer)

    def wait(self, _: Side | None) -> None:
        which = self.random.randrange(2)
        found = sorted(
            (self.names.get(fd, "epoll"), spell(events)) for fd, events in self.epolls[which].poll(0, 64)
        )
        self.say("epoll_wait", which, sorted(set(found)))

    def poll(self, _: Side | None) -> None:
        poll = select.poll()
        for side in self.sides:
            if not side.closed:
                poll.register(side.number, self.random.choice([1, 4, 5, 0, select.POLLRDHUP | 1]))
        poll.register(self.pipe[0], select.POLLIN)
        self.say("poll", sorted((self.names[fd], spell(events)) for fd, events in poll.poll(0)))

    def select(self, _: Side | None) -> None:
        numbers = [side.number for side in self.sides if not side.closed] + [self.pipe[0]]
        found = select.select(numbers, [n for n in numbers if n != self.pipe[0]], numbers, 0)
        self.say("select", [sorted(self.names[fd] for fd in part) for part in found])

    def shutdown(self, side: Side | None) -> None:
        if side is None or self.edges or self.random.random() < 0.6 or side.over():
            return
        try:
            side.sock.shutdown(socket.SHUT_WR)
            answer = "ok"
            side.other.ended = True
        except OSError as error:
            answer = errno.errorcode[error.errno or 0]
        self.say("shutdown", side.name, answer)

    def close(self, side: Side | None) -> None:
        if side is None or self.edges or self.random.random() < 0.8 or (side.over() and side.unread):
            return
        side.sock.close()
        side.closed = True
        side.other.ended = True
        side.other.reset |= side.unread > 0
        self.say("close", side.name)

    def fill_pipe(self, _: Side | None) -> None:
        if self.piped:
            os.read(self.pipe[0], 100)
            self.piped = 0
        else:
            os.write(self.pipe[1], b"x")
            self.piped = 1
        self.say("pipe", self.piped)

    def nest(self, _: Side | None) -> None:
        if self.nested:
            self.epolls[1].unregister(self.epolls[0].fileno())
        else:
            self.epolls[1].register(self.epolls[0].fileno(), select.EPOLLIN)
            self.names[self.epolls[0].fileno()] = "epoll0"
        self.nested = not self.nested
        self.say("nest", self.nested)


def main() -> None:
    run = Run(int(sys.argv[1]))
    for _ in range(int(sys.argv[2])):
        run.step()


main()
