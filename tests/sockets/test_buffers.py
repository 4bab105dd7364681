"""SO_SNDBUF and SO_RCVBUF: what they say, and what they do."""

from __future__ import annotations

import contextlib
import fcntl
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmmc_emu import Cluster

TIMEOUT_S = 30

EchoServer = Callable[..., int]


def told(name: int, values: list[int]) -> list[int]:
    """What getsockopt says of a buffer that was set to each of the values."""
    said = []
    for value in values:
        with socket.socket() as each:
            each.setsockopt(socket.SOL_SOCKET, name, value)
            said.append(each.getsockopt(socket.SOL_SOCKET, name))
    return said


@pytest.mark.parametrize("name", [socket.SO_SNDBUF, socket.SO_RCVBUF])
def test_told_as_the_kernel_tells(two_nodes: Cluster, name: int) -> None:
    """Doubled, and within the same bounds."""
    values = [-1, 0, 1, 1000, 2303, 2304, 5000, 65536, 212_992, 300_000, 1 << 30]
    assert two_nodes.node(0).python(told, name, values) == told(name, values)


def pair(receive: int, send: int) -> tuple[socket.socket, socket.socket, socket.socket]:
    """A listener with these buffers, a client that sets its own, and what was accepted."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send)
    listener.bind(("0.0.0.0", 0))
    listener.listen()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    client.connect(("127.0.0.1", listener.getsockname()[1]))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send)  # connected already
    accepted, _ = listener.accept()
    return listener, client, accepted


def fill(sender: socket.socket, least: int) -> int:
    """Writes until at least so many bytes were accepted and no more are; how many were."""
    sender.setblocking(False)
    deadline = time.monotonic() + TIMEOUT_S
    sent, full = 0, False
    while sent < least or not full:
        assert time.monotonic() < deadline, sent
        try:
            sent += sender.send(bytes(100))
            full = False
        except BlockingIOError:
            full = True
    return sent


def read(reader: socket.socket, count: int) -> None:
    reader.settimeout(TIMEOUT_S)
    while count:
        count -= len(reader.recv(count))


def bounded(receive: int, send: int) -> list[tuple[int, list[bool], list[bool]]]:
    """For both directions: bytes that were accepted unread; whether it could be written to then, by level and
    by edge; and once everything was read, with what edges there were after that."""
    listener, client, accepted = pair(receive, send)
    buffers = [accepted.getsockopt(socket.SOL_SOCKET, name) for name in (socket.SO_RCVBUF, socket.SO_SNDBUF)]
    assert buffers == [2 * receive, 2 * send]  # the listener's
    found = []
    for sender, reader in ((client, accepted), (accepted, client)):
        poll, edges = select.poll(), select.epoll()
        poll.register(sender, select.POLLOUT)
        edges.register(sender, select.EPOLLOUT | select.EPOLLET)
        # The receiver's buffer and the sender's; what the sender knows of the first may lag by a quarter of
        # its own.
        sent = fill(sender, receive + send - send // 4)
        full = [bool(poll.poll(0)), bool(edges.poll(0))]
        read(reader, sent)
        emptied = [bool(edges.poll(TIMEOUT_S)), bool(poll.poll(0)), bool(edges.poll(0))]
        found.append((sent, full, emptied))
        edges.close()
    for each in (listener, client, accepted):
        each.close()
    return found


@pytest.mark.parametrize(("receive", "send"), [(4096, 8192), (8192, 2304), (20_000, 100_000)])
def test_bound_what_is_on_its_way(two_nodes: Cluster, receive: int, send: int) -> None:
    """A sender that nobody reads from fills the two buffers; inherited by accepted sockets."""
    for sent, when_full, when_emptied in two_nodes.node(0).python(bounded, receive, send):
        assert receive + send - send // 4 <= sent <= receive + send
        assert when_full == [False, False]
        assert when_emptied == [True, True, False]


def writes_without_a_reader() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        client.sendall(bytes(range(256)) * 2048)
        received = b""
        while len(received) < 256 * 2048:
            received += accepted.recv(1 << 20)
        assert received == bytes(range(256)) * 2048
        client.close()
        accepted.close()
        return len(received)


def test_half_a_megabyte_unread(two_nodes: Cluster) -> None:
    """As over the kernel, one thread can write to itself and read later."""
    assert two_nodes.node(0).python(writes_without_a_reader) == 256 * 2048


def abandon(host: str, port: int) -> int:
    """Writes what nobody reads yet, and ends without closing anything."""
    return fill(socket.create_connection((host, port)), 1 << 20)


LATE_READER = """
import socket
listener = socket.create_server(("0.0.0.0", 0))
print(listener.getsockname()[1], flush=True)
connection = listener.accept()[0]
input()
count = 0
while data := connection.recv(1 << 16):
    count += len(data)
print(count, flush=True)
"""


def test_what_was_accepted_arrives_after_death(two_nodes: Cluster) -> None:
    """Bytes for which the reader has no room yet outlive the program that wrote them."""
    with two_nodes.node(0).popen(
        [sys.executable, "-c", LATE_READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        try:
            written = two_nodes.node(1).python(abandon, "node0", int(reader.stdout.readline()))
            found, _ = reader.communicate("read\n", timeout=TIMEOUT_S)
            assert int(found) == written
        finally:
            reader.kill()


CONNECTIONS, MIB = 8, 1 << 20

ONE_LATE_READER = f"""
import socket, threading
listener = socket.create_server(("0.0.0.0", 0))
print(listener.getsockname()[1], flush=True)
connections = [listener.accept()[0] for _ in range({CONNECTIONS})]
connections[0].sendall(bytes({MIB}))
def echo(connection):
    count = 0
    while count < {MIB}:
        count += len(data := connection.recv(1 << 16))
        connection.sendall(data)
threads = [threading.Thread(target=echo, args=(each,)) for each in connections[1:]]
for each in threads: each.start()
for each in threads: each.join()
input()
count = 0
while data := connections[0].recv(1 << 16):
    count += len(data)
print(count, flush=True)
input()
"""

DIES_WITH_FULL_RINGS = f"""
import os, signal, socket, sys, threading
connections = [socket.create_connection(("node0", int(sys.argv[1]))) for _ in range({CONNECTIONS})]
def exchange(connection):
    writer = threading.Thread(target=connection.sendall, args=(bytes({MIB}),))
    writer.start()
    left = {MIB}
    while left:
        left -= len(connection.recv(1 << 16))
    writer.join()
left = {MIB}
while left:
    left -= len(connections[0].recv(1 << 16))
threads = [threading.Thread(target=exchange, args=(each,)) for each in connections[1:]]
for each in threads: each.start()
for each in threads: each.join()
connections[0].setblocking(False)
sent = 0
while sent < 1 << 18:
    try: sent += connections[0].send(bytes(4096))
    except BlockingIOError: pass
print(sent, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def allocated(cluster: Cluster, besides: set[str]) -> int:
    """Bytes of memory that segments of programs have, but for these."""
    found = 0
    for name in set(cluster.place.segments()) - besides:
        with contextlib.suppress(FileNotFoundError):
            found += Path("/dev/shm", name).stat().st_blocks * 512 if ".ep" in name else 0
    return found


def test_a_dead_program_leaves_what_its_peers_have_not_read(two_nodes: Cluster) -> None:
    """All else of its memory goes, though one of its connections is not over; then that too."""
    with two_nodes.node(0).popen(
        [sys.executable, "-c", ONE_LATE_READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        try:
            port = reader.stdout.readline().strip()
            besides = set(two_nodes.place.segments())
            dies = [sys.executable, "-c", DIES_WITH_FULL_RINGS, port]
            done = two_nodes.node(1).run(dies, timeout=TIMEOUT_S)
            assert done.returncode == -signal.SIGKILL, done.stderr
            sent = int(done.stdout)
            deadline = time.monotonic() + TIMEOUT_S
            while (left := allocated(two_nodes, besides)) > sent + 256 * 1024:
                assert time.monotonic() < deadline, left
                time.sleep(0.02)
            assert left >= sent - 128 * 1024, "what the reader has room for has arrived, and no more"
            reader.stdin.write("read\n")
            reader.stdin.flush()
            assert int(reader.stdout.readline()) == sent
            while left := allocated(two_nodes, besides):
                assert time.monotonic() < deadline, left
                time.sleep(0.02)
        finally:
            reader.kill()


def unacknowledged(sock: socket.socket) -> int:
    """SIOCOUTQ."""
    answer = fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


def until_acknowledged(sock: socket.socket) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while unacknowledged(sock):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def outstanding(sizes: list[int]) -> list[int]:
    """After each write: what was not acknowledged once it was all read.  No other bytes pass."""
    listener, client, accepted = pair(1 << 20, 1 << 20)
    found = []
    for size in sizes:
        client.sendall(bytes(size))
        read(accepted, size)
        until_acknowledged(client)
        found.append(unacknowledged(client))
    for each in (listener, client, accepted):
        each.close()
    return found


def test_what_was_read_is_acknowledged(two_nodes: Cluster) -> None:
    """SIOCOUTQ comes to 0, however few bytes there were and although the peer says nothing by itself."""
    assert two_nodes.node(0).python(outstanding, [1, 100, 10_000, 200_000, 1]) == [0] * 5


SENDER = """
import fcntl, socket, sys, termios, time
sock = socket.create_connection(("node1", int(sys.argv[1])))
print("connected", flush=True)
input()
sock.sendall(b"x" * 1000)
def outstanding():
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
print(outstanding(), flush=True)
input()
while outstanding():
    time.sleep(0.001)
print("acknowledged", flush=True)
"""


def test_what_the_wire_holds_is_not_acknowledged(two_nodes: Cluster, echo_server: EchoServer) -> None:
    """SIOCOUTQ counts what the NIC has sent, as long as the peer's NIC has not said that it is there."""
    port = echo_server(two_nodes, 1)
    with two_nodes.node(0).popen(
        [sys.executable, "-c", SENDER, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as sender:
        assert sender.stdin is not None
        assert sender.stdout is not None
        try:
            assert sender.stdout.readline() == "connected\n"
            two_nodes.link(0, 1).down()
            print(file=sender.stdin, flush=True)
            assert sender.stdout.readline() == "1000\n"
            two_nodes.link(0, 1).up()
            print(file=sender.stdin, flush=True)
            assert sender.stdout.readline() == "acknowledged\n"
        finally:
            sender.kill()
            two_nodes.link(0, 1).reset()


def lowered(times: int) -> int:
    """Lowers SO_SNDBUF while much is under way that was read, and goes on writing: bytes that arrived."""
    listener, client, accepted = pair(1 << 20, 1 << 20)
    client.settimeout(TIMEOUT_S)
    count = 0
    for _ in range(times):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        client.sendall(bytes(200_000))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2304)
        read(accepted, 200_000)
        client.sendall(b"x")
        read(accepted, 1)
        count += 200_001
    for each in (listener, client, accepted):
        each.close()
    return count


def test_a_buffer_made_smaller_while_it_is_full(two_nodes: Cluster) -> None:
    """The writer has room again as soon as what it wrote before is read."""
    assert two_nodes.node(0).python(lowered, 20) == 20 * 200_001


def placed(distances: list[int], lengths: list[int]) -> int:
    """Sends from, and receives to, places at a distance from the ring's within their pages; how many of them
    carried what was sent."""
    import mmap
    import random

    listener, client, accepted = pair(1 << 20, 1 << 20)
    page, position, right = 4096, 0, 0
    ours, theirs = memoryview(mmap.mmap(-1, 1 << 20)), memoryview(mmap.mmap(-1, 1 << 20))
    for distance in distances:
        for length in lengths:
            data = random.randbytes(length)
            source, target = (position - distance) % page, (position + distance) % page
            ours[source : source + length] = data
            client.sendall(ours[source : source + length])
            theirs[:] = bytes(1 << 20)
            got = 0
            while got < length:
                got += accepted.recv_into(theirs[target + got : target + length])
            around = bytes(theirs[:target]) + bytes(theirs[target + length :])
            right += theirs[target : target + length] == data and not any(around)
            position += length
    for each in (listener, client, accepted):
        each.close()
    return right


def test_wherever_the_programs_buffer_lies_in_its_page(two_nodes: Cluster) -> None:
    """Bytes are copied in another way where source and destination lie close within their pages."""
    distances, lengths = [0, 1, 16, 31, 127, 128, 4095], [1, 2047, 2048, 2049, 4096, 6145, 65536, 65543]
    assert two_nodes.node(0).python(placed, distances, lengths) == len(distances) * len(lengths)


def read_slowly(port: int, receive_buffer: int) -> int:
    """Accepts one connection and reads all that it gets, in small parts; how much."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        listener.bind(("", port))
        listener.listen()
        connection, _ = listener.accept()
        got = 0
        with connection:
            while part := connection.recv(receive_buffer // 4):
                got += len(part)
                time.sleep(0.0005)  # slower than what fills the buffers, and the test is about what is full
        return got


def send(host: str, port: int, length: int) -> None:
    """Sends so many bytes in one call."""
    with socket.create_connection((host, port)) as connection:
        connection.sendall(bytes(length))


def test_a_writer_sleeps_until_a_quarter_of_its_buffer_is_free(two_nodes: Cluster) -> None:
    """However small the parts are in which a slow reader makes room."""
    length, quarter = 16 << 20, 256 << 10
    reading = two_nodes.node(1).submit(read_slowly, 7531, 64 << 10)
    two_nodes.node(1).wait_for_port(7531)
    before = two_nodes.node(0).counters()["app_sleeps"]
    two_nodes.node(0).python(send, "node1", 7531, length)
    assert reading.result(60) == length
    assert two_nodes.node(0).counters()["app_sleeps"] - before < 2 * length // quarter
