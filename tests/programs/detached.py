"""A program whose NIC lets go of it while it lives: what waits ends, and so does what it asks then."""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
import threading
from collections.abc import Callable

from vmmc_emu import vmmc

HOST, PORT = "node1", int(sys.argv[1])
results: dict[str, str] = {}


def error_of(call: Callable[[], object]) -> str:
    """The name of the errno that a call fails with, or what it returns."""
    try:
        return repr(call())
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def waits(name: str, call: Callable[[], object]) -> threading.Thread:
    """A thread that is in this call when the NIC lets go."""

    def run() -> None:
        results[name] = error_of(call)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def set_with(one: socket.socket, more: int | None = None) -> Callable[[], object]:
    """Waits in an epoll set; with a kernel descriptor in it where one is given."""
    epoll = select.epoll()
    epoll.register(one, select.EPOLLIN | select.EPOLLET)
    if more is not None:
        epoll.register(more, select.EPOLLIN)
    return lambda: [bool(events & select.EPOLLERR) for _, events in epoll.poll()]


connection = socket.create_connection((HOST, PORT))
others = [socket.create_connection((HOST, PORT)) for _ in range(3)]
listener, second = socket.create_server(("", 0)), socket.create_server(("", 0))
bound = socket.socket()
bound.bind(("", 0))
endpoint = vmmc.attach()
exported = endpoint.export(endpoint.alloc(4096), name="waits")
pipe = os.pipe()
threads = [
    waits("recv", lambda: connection.recv(1)),
    waits("accept", listener.accept),
    waits("epoll", set_with(others[0])),
    waits("epoll listener", set_with(second)),
    waits("epoll and pipe", set_with(others[1], pipe[0])),
    waits("poll", lambda: len(select.select([others[2], second], [], [])[0])),
    waits("notification", exported.notification),
]
print("waiting", flush=True)
sys.stdin.readline()
for thread in threads:
    thread.join()
for name, call in {
    "bind": lambda: socket.socket().bind(("", 0)),
    "listen": bound.listen,
    "connect": lambda: socket.create_connection((HOST, PORT)),
    "send": lambda: others[0].send(b"x") and others[0].send(b"x"),
    "accept again": second.accept,
    "import": lambda: endpoint.import_(1, "nothing"),
}.items():
    results[name] = error_of(call)
child = os.fork()
if not child:  # another process: it has a network
    own = socket.create_connection((HOST, PORT))
    own.sendall(b"x")
    os._exit(own.recv(1) != b"x")
results["child"] = str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
for name, result in results.items():
    print(f"{name}: {result}")
