"""Very many connections: in one process at once, all in use; opened and closed in turn, with nothing left.

Not among the tests that run by default: `tox run -e load`.  VMMC_CHURN=100000 opens that many in turn.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vmmc_emu import Cluster

MANY = 10_000
CHURN = int(os.environ.get("VMMC_CHURN", "20000"))
PORT = 7500

# Echoes, one epoll over all; a line on stdin is answered when all that was asked before has been done.
SERVER = f"""
import os, select, socket, sys
listener = socket.create_server(("0.0.0.0", {PORT}), backlog=4096)
listener.setblocking(False)
poll = select.epoll()
poll.register(listener, select.EPOLLIN)
poll.register(0, select.EPOLLIN)
held = {{}}
print("ready", flush=True)
while True:
    for fd, events in poll.poll():
        if fd == 0:
            if not os.read(0, 100):
                sys.exit()
            pages = int(open("/proc/self/statm").read().split()[1])
            print(len(held), len(os.listdir("/proc/self/fd")), pages * 4096, flush=True)
        elif fd == listener.fileno():
            try:
                while True:
                    connection = listener.accept()[0]
                    held[connection.fileno()] = connection
                    poll.register(connection, select.EPOLLIN)
            except BlockingIOError:
                pass
        elif data := held[fd].recv(65536):
            held[fd].sendall(data)
        else:
            poll.unregister(fd)
            held.pop(fd).close()
"""


class Server:
    """The echo server, and what it says of itself."""

    def __init__(self, cluster: Cluster) -> None:
        self.process = cluster.node(0).popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        line: str = self.process.stdout.readline()
        return line.strip()

    def state(self) -> tuple[int, int, int]:
        """How many connections it has, how many descriptors, and its resident bytes."""
        assert self.process.stdin is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        connections, descriptors, resident = map(int, self._line().split())
        return connections, descriptors, resident

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def server(two_nodes: Cluster) -> Iterator[Server]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MANY + 100:
        pytest.skip(f"a process may have {hard} descriptors here, and {MANY + 100} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, MANY + 100), hard))  # programs inherit it
    server = Server(two_nodes)
    yield server
    server.end()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def shared_memory(cluster: Cluster) -> dict[str, int]:
    """The server's node's segments, and how many bytes each has committed."""
    return {
        path.name: path.stat().st_blocks * 512
        for path in Path("/dev/shm").iterdir()
        if f".{cluster.name}.node0." in path.name  # the server's: a client's go while one looks
    }


def many(host: str, port: int, count: int, rounds: int) -> list[int]:
    """So many connections at once, all in use in turn; the resident bytes before, with them and after."""

    def resident() -> int:
        return int(psutil.Process().memory_info().rss)

    before = resident()
    poll = select.epoll()
    sockets: dict[int, socket.socket] = {}
    order = []
    for _ in range(count):
        each = socket.create_connection((host, port), timeout=60)
        sockets[each.fileno()] = each
        order.append(each)
        poll.register(each, select.EPOLLIN)
    with_all = resident()
    for round in range(rounds):
        for i, each in enumerate(order):
            each.sendall(b"%d of %d" % (i, round))
        waiting = {each.fileno(): i for i, each in enumerate(order)}
        while waiting:
            for fd, _ in poll.poll(60):
                assert sockets[fd].recv(100) == b"%d of %d" % (waiting.pop(fd), round)
    # One in use among all of them.
    for i in range(1000):
        each = order[i * 7919 % count]
        each.sendall(b"one")
        [(fd, _)] = poll.poll(60)
        assert fd == each.fileno()
        assert each.recv(10) == b"one"
    used = resident()
    for each in order:
        each.close()
    return [before, with_all, used]


def test_ten_thousand_at_once(two_nodes: Cluster, server: Server) -> None:
    """All active in turn, on both sides, and one among all."""
    server.state()
    before = two_nodes.counters()["node0"]["bytes_received"]
    print(two_nodes.node(1).python(many, "node0", PORT, MANY, 3))
    print(server.state(), shared_memory(two_nodes))
    assert two_nodes.counters()["node0"]["bytes_received"] - before >= MANY * 3 * 6


def churn(host: str, port: int, count: int) -> tuple[int, int]:
    """Opens and closes so many, one after the other; how many descriptors it has more, and resident bytes."""

    def one(i: int) -> None:
        with socket.create_connection((host, port), timeout=60) as each:
            if i % 2:
                each.sendall(b"%d" % i)
                assert each.recv(100) == b"%d" % i
            if i % 4 < 2:
                # The server has closed its end: otherwise the most that there ever were at once, and so the
                # memory that is kept for the next ones, would depend on how busy the machine is.
                each.shutdown(socket.SHUT_WR)
                assert each.recv(1) == b""

    process = psutil.Process()
    for i in range(500):  # what is made once
        one(i)
    descriptors, resident = process.num_fds(), process.memory_info().rss
    for i in range(count):
        one(i)
    return process.num_fds() - descriptors, process.memory_info().rss - resident


def test_opened_and_closed_in_turn(two_nodes: Cluster, server: Server) -> None:
    """Connections come and go, and segments, descriptors and memory are what they were."""
    two_nodes.node(1).python(churn, "node0", PORT, 100)
    while (first := server.state())[0]:
        pass
    segments = shared_memory(two_nodes)
    descriptors, resident = two_nodes.node(1).python(churn, "node0", PORT, CHURN)
    print(descriptors, resident)
    while (after := server.state())[0]:  # the last ones' ends are under way
        pass
    print(first, after)
    assert descriptors == 0
    assert resident < 1 << 20
    assert after[1] == first[1]
    assert after[2] - first[2] < 2 << 20
    now = shared_memory(two_nodes)
    assert now.keys() == segments.keys()
    # Rings are committed when first used, and used again: 1 MiB of the listener's, 256 KiB of events.
    assert {name: (segments[name], now[name]) for name in now if now[name] - segments[name] > 3 << 19} == {}
