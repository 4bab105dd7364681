"""Very many connections: in one process at once, in use and idle; opened and closed in turn, with none left.

VMMC_MANY says how many at once, VMMC_CHURN how many in turn: `tox run -e load` has 10,000 and 100,000.
"""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vmmc_emu import Cluster

MANY = int(os.environ.get("VMMC_MANY", "500"))
CHURN = int(os.environ.get("VMMC_CHURN", "1000"))
MOST = 12 * 1024  # bytes of memory of an unused or idle connection
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


# A line on stdin is a step: open so many connections, use each in turn, use one among all at a time.
CLIENT = f"""
import select, socket, sys
poll = select.epoll()
sockets, order = {{}}, []

def answer(sock):
    [(fd, _)] = poll.poll(60)
    assert fd == sock.fileno()
    return sock.recv(100)

for line in sys.stdin:
    step, count = line.split()
    if step == "open":
        for _ in range(int(count)):
            each = socket.create_connection(("node0", {PORT}), timeout=60)
            sockets[each.fileno()] = each
            order.append(each)
            poll.register(each, select.EPOLLIN)
    elif step == "use":
        for i, each in enumerate(order):
            each.sendall(b"%d of many" % i)
        waiting = {{each.fileno(): b"%d of many" % i for i, each in enumerate(order)}}
        while waiting:
            for fd, _ in poll.poll(60):
                assert sockets[fd].recv(100) == waiting.pop(fd)
    elif step == "fill":
        for i, each in enumerate(order):
            each.sendall(b"%07d " % i * (int(count) // 8))
            got = b""
            while len(got) < int(count):
                got += each.recv(1 << 20)
            assert got == b"%07d " % i * (int(count) // 8)
    elif step == "one":
        for i in range(int(count)):
            each = order[i * 7919 % len(order)]
            each.sendall(b"%d" % i)
            assert answer(each) == b"%d" % i
    elif step == "close":
        for each in order:
            each.close()
    print(step, flush=True)
"""


def private(pid: int) -> int:
    """Bytes of memory that a process shares with nobody."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell")


class Memory:
    """What the server's connections cost: its segments, and what it and its NIC have besides."""

    def __init__(self, cluster: Cluster, server: Server) -> None:
        self.cluster, self.server = cluster, server
        self.nic: int = cluster.status()["nodes"][0]["nic_pid"]
        self.before = self.now()

    def now(self) -> int:
        return (
            sum(shared_memory(self.cluster).values()) + private(self.nic) + private(self.server.process.pid)
        )

    def each(self) -> float:
        """Bytes for each connection."""
        return (self.now() - self.before) / MANY


def test_many_at_once(two_nodes: Cluster, server: Server) -> None:
    """All active in turn, on both sides, and one among all; they cost little before, and when idle again."""
    memory = Memory(two_nodes, server)
    with two_nodes.node(1).popen(
        [sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as client:

        def step(what: str, count: int = 0) -> None:
            assert client.stdin is not None and client.stdout is not None
            client.stdin.write(f"{what} {count}\n")
            client.stdin.flush()
            assert client.stdout.readline().strip() == what

        def becomes_idle() -> None:
            deadline = time.monotonic() + 60
            while memory.each() >= MOST:
                assert time.monotonic() < deadline, f"{memory.each():.0f} bytes each"
                time.sleep(0.05)  # it takes the NICs a second to find that nothing moves

        try:
            received = two_nodes.counters()["node0"]["bytes_received"]
            step("open", MANY)
            while server.state()[0] < MANY:
                pass
            print(f"unused: {memory.each():.0f} bytes each")
            assert memory.each() < MOST
            step("use")
            print(f"used: {memory.each():.0f} bytes each")
            looks = two_nodes.counters()["node1"]["epoll_looks"]
            step("one", 1000)
            # A wait looks at what is ready and at what it reported the time before, and not at all others.
            assert two_nodes.counters()["node1"]["epoll_looks"] - looks <= 2 * 1000 + MANY
            becomes_idle()
            step("fill", 100_000)
            print(f"filled: {memory.each():.0f} bytes each")
            becomes_idle()
            print(f"idle: {memory.each():.0f} bytes each")
            step("use")  # they are what they were
            assert two_nodes.counters()["node0"]["bytes_received"] - received >= MANY * 100_000
            step("close")
        finally:
            client.kill()


def converse(host: str, port: int, messages: int, length: int, *, paused: bool = False) -> int:
    """Sends so many and gets each back; bytes of shared memory that the other node had more by then.

    paused: until the NICs have taken pages back, after some 8,000 bytes.
    """
    segments = [path for path in Path("/dev/shm").iterdir() if f"{os.environ['CLUSTER']}.node0." in path.name]

    def committed() -> int:
        return sum(path.stat().st_blocks for path in segments) * 512

    with socket.create_connection((host, port)) as connection:
        before = committed()
        for number in range(messages):
            if paused and number == 8000 // length:
                # It takes the NICs a second to find that nothing moves; they may have, when this was held up.
                deadline, most = time.monotonic() + 10, committed()
                while committed() >= most and time.monotonic() < deadline:
                    time.sleep(0.05)
            message = number.to_bytes(4, "little") * (length // 4)
            connection.sendall(message)
            got = connection.recv(length, socket.MSG_WAITALL)
            assert got == message
        return committed() - before


@pytest.mark.parametrize(("length", "paused"), [(100, False), (100, True), (4096, False), (9000, False)])
def test_ends_that_keep_up_touch_few_pages(
    two_nodes: Cluster, server: Server, length: int, paused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rings have a mebibyte each, and a conversation goes around them many times: in their first pages."""
    monkeypatch.setenv("CLUSTER", two_nodes.name)
    two_nodes.node(1).python(converse, "node0", PORT, 10, 4096)  # what an endpoint needs once
    more = two_nodes.node(1).python(converse, "node0", PORT, 8_000_000 // length, length, paused=paused)
    assert more < 400 << 10


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
    nic: int = two_nodes.status()["nodes"][0]["nic_pid"]
    nic_descriptors, memory = psutil.Process(nic).num_fds(), private(nic) + private(server.process.pid)
    descriptors, resident = two_nodes.node(1).python(churn, "node0", PORT, CHURN)
    print(descriptors, resident)
    while (after := server.state())[0]:  # the last ones' ends are under way
        pass
    print(first, after)
    assert descriptors == 0
    assert resident < 1 << 20
    assert after[1] == first[1]
    assert psutil.Process(nic).num_fds() == nic_descriptors
    assert shared_memory(two_nodes).keys() == segments.keys()
    assert private(nic) + private(server.process.pid) - memory < 1 << 20

    def more() -> dict[str, int]:
        return {name: size - segments[name] for name, size in shared_memory(two_nodes).items()}

    deadline = time.monotonic() + 60
    while max(more().values()) > 300 << 10:  # the ring of events has 256 KiB, and goes around
        assert time.monotonic() < deadline, more()
        time.sleep(0.05)  # it takes the NICs a second to find that nothing moves
