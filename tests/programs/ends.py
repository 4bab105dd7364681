"""How connections end: shutdown, close and reset in every order; prints what calls gave and what was ready.

    python ends.py LENGTH [edges]

Run over the kernel and on a node, the two transcripts must be equal.  After each step it waits, where
something is to arrive, for just that.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import select
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable

SHUT = {"r": socket.SHUT_RD, "w": socket.SHUT_WR, "rw": socket.SHUT_RDWR}
NAMES = ("IN", "OUT", "PRI", "ERR", "HUP", "RDHUP")
FIN_WAIT1, FIN_WAIT2, CLOSE, CLOSE_WAIT, LAST_ACK = 4, 5, 7, 8, 9
ALL = select.POLLIN | select.POLLOUT | select.POLLPRI | select.POLLRDHUP


def attempt(call: Callable[[], object]) -> str:
    """What a call gave, or the name of its error."""
    try:
        return repr(call())
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def spell(events: int) -> str:
    """Events by name; poll's and epoll's are the same."""
    return "|".join(name for name in NAMES if events & getattr(select, f"POLL{name}")) or "-"


def ready(sock: socket.socket) -> str:
    """What poll says now."""
    poll = select.poll()
    poll.register(sock, ALL)
    return spell(dict(poll.poll(0)).get(sock.fileno(), 0))


def raw_state(sock: socket.socket) -> int:
    """TCP's state."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def tcp_state(sock: socket.socket) -> int:
    """TCP's state, of which a FIN that is acknowledged or not are the same here: the kernel delays that."""
    state = raw_state(sock)
    return FIN_WAIT2 if state == FIN_WAIT1 else state


def wait_until(condition: Callable[[], bool]) -> None:
    """Until the peer's part of a step has arrived."""
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("what a step must bring about did not arrive")
        os.sched_yield()


def pair() -> dict[str, socket.socket]:
    """A connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        a = socket.create_connection(listener.getsockname())
        b, _ = listener.accept()
    a.setblocking(False)
    b.setblocking(False)
    return {"a": a, "b": b}


def waiting(sock: socket.socket) -> int:
    """Bytes that have arrived and nobody has read."""
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)


def settle(action: str, before: int, unread: int, ends: dict[str, socket.socket]) -> None:
    """Waits for what an action brings to the other side."""
    actor, _, what = action.partition(" ")
    end, other = ends[actor], ends["b" if actor == "a" else "a"]
    if other.fileno() < 0:
        if what == "send":  # a closed end answers bytes by a reset
            wait_until(lambda: tcp_state(end) == CLOSE)
    elif what == "send":
        wait_until(lambda: tcp_state(other) == CLOSE or waiting(other) == before + 5)
        if tcp_state(other) == CLOSE:  # bytes for who has shut down both ways are answered by a reset
            wait_until(lambda: tcp_state(end) == CLOSE)
    elif what == "abort" or (what == "close" and unread):
        wait_until(lambda: tcp_state(other) == CLOSE)
    elif what == "close":
        wait_until(lambda: tcp_state(other) in (CLOSE_WAIT, LAST_ACK, CLOSE))
    elif what in ("w", "rw"):
        wait_until(lambda: tcp_state(other) in (CLOSE_WAIT, LAST_ACK, CLOSE))
        if tcp_state(other) != CLOSE_WAIT:  # both have ended: that settles by itself
            wait_until(lambda: tcp_state(end) == tcp_state(other) == CLOSE)


class Watch:
    """Two sets that watch an end: one for its edges, one to know that what is ready has come to sets."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.edges, self.levels = select.epoll(), select.epoll()
        self.edges.register(end, ALL | select.EPOLLET)
        self.levels.register(end, ALL)
        self.edges.poll(0)  # what there is from the start has been told

    def told(self, edges: select.epoll) -> str:
        return spell(dict(edges.poll(0)).get(self.end.fileno(), 0))

    def edge(self) -> str:
        """What is told anew."""
        if self.end.fileno() < 0:
            return "closed"
        # The kernel tells of a FIN's acknowledgement, which it delays.
        wait_until(lambda: raw_state(self.end) != FIN_WAIT1)
        wait_until(lambda: self.told(self.levels) == ready(self.end))
        return self.told(self.edges)

    def close(self) -> None:
        self.edges.close()
        self.levels.close()


def act(action: str, ends: dict[str, socket.socket]) -> str:
    actor, _, what = action.partition(" ")
    end = ends[actor]
    if what in SHUT:
        return attempt(lambda: end.shutdown(SHUT[what]))
    if what == "send":
        return attempt(lambda: end.send(b"hello"))
    if what == "recv":
        return attempt(lambda: end.recv(3))
    if what == "abort":
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return attempt(end.close)


def state(end: socket.socket) -> str:
    """All that a program can see of an end without changing it, and then by reading and writing."""
    if end.fileno() < 0:
        return "closed"
    peek = attempt(lambda: end.recv(9, socket.MSG_PEEK))
    name = attempt(lambda: end.getpeername()[0])
    return f"{ready(end)} peek {peek} state {tcp_state(end)} peer {name}"


def last_words(end: socket.socket) -> str:
    """What is left of an end, in the order in which a program would find out."""
    if end.fileno() < 0:
        return "closed"
    words = [attempt(lambda: end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))]
    words += [attempt(lambda: end.recv(9)), attempt(lambda: end.recv(9)), ready(end)]
    return " ".join(words)


def run(actions: tuple[str, ...], with_edges: bool) -> None:
    ends = pair()
    watches = {name: Watch(end) for name, end in ends.items()}
    print("--", ", ".join(actions), flush=True)
    for action in actions:
        actor = action[0]
        if ends[actor].fileno() < 0:
            continue
        other = ends["b" if actor == "a" else "a"]
        before = waiting(other) if other.fileno() >= 0 else 0
        unread = waiting(ends[actor])
        result = act(action, ends)
        if result in ("None", "5"):
            settle(action, before, unread, ends)
        if with_edges:
            print("edges:", *(f"{name} {watch.edge()}" for name, watch in watches.items()))
        print(f"{action}: {result}; a {state(ends['a'])}; b {state(ends['b'])}")
    for name, end in ends.items():
        print(f"{name}: {last_words(end)}")
    for name, end in ends.items():
        end.close()
        watches[name].close()


def main() -> None:
    signal_free = [f"{end} {what}" for end in "ab" for what in ("r", "w", "rw", "send", "close", "abort")]
    length, with_edges = int(sys.argv[1]), "edges" in sys.argv
    for actions in itertools.product(signal_free, repeat=length):
        if actions[0].startswith("a"):  # the other half is the same with the names exchanged
            run(actions, with_edges)


if __name__ == "__main__":
    main()
