"""A peer that does not answer for too long is given up: whoever waits for it is told, and nobody else."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vmmc_emu
from vmmc_emu import Cluster, observe, wires
from vmmc_emu.wires import Change

PORT = 7000
CUT = {"up": False, "unreachable_ns": 300_000_000}
TIMEOUT_S = 60


def change(cluster: Cluster, settings: dict[str, Any], *pairs: tuple[int, int]) -> None:
    """These wires, and nothing of what they were before."""
    wires.change(cluster.place, [Change([a], [b], settings, reset=True) for a, b in pairs])


@pytest.fixture
def cluster(eight_nodes: Cluster) -> Iterator[Cluster]:
    """Nodes whose wires are perfect before and after."""
    yield eight_nodes
    change(eight_nodes, {}, *((a, b) for a in range(8) for b in range(8) if a != b))


def receive_until_told(port: int, connections: int = 1) -> list[tuple[str, int]]:
    """Accepts, and says how each connection ended: "error" and errno, or "end" and bytes; runs on a node."""
    with socket.create_server(("", port)) as listener:
        accepted = [listener.accept()[0] for _ in range(connections)]
    ends = []
    for connection in accepted:
        count = 0
        try:
            while data := connection.recv(1 << 16):
                count += len(data)
            ends.append(("end", count))
        except OSError as error:
            ends.append(("error", error.errno or 0))
    return ends


def send_until_told(host: str, port: int) -> int:
    """Connects and sends without end; the errno of the failure; runs on a node."""
    with socket.create_connection((host, port)) as connection:
        try:
            while True:
                connection.send(bytes(1 << 16))
        except OSError as error:
            return error.errno or 0


def wait_until_told(host: str, port: int) -> int:
    """Connects and receives; the errno of the failure, 0: end of file; runs on a node."""
    with socket.create_connection((host, port)) as connection:
        try:
            connection.recv(1)
        except OSError as error:
            return error.errno or 0
    return 0


def connect(host: str, port: int) -> int:
    """The errno of connecting; runs on a node."""
    with socket.socket() as connection:
        return connection.connect_ex((host, port))


def until(node: Any, state: str, count: int) -> None:
    """Waits until a node has so many sockets in a state."""
    while sum(each.state == state and each.port == PORT for each in node.sockets()) < count:
        pass


@pytest.mark.parametrize("cut", [[(1, 2)], [(2, 1)], [(1, 2), (2, 1)]], ids=["there", "back", "both"])
def test_senders_receivers_and_connects_are_told_and_others_go_on(
    cluster: Cluster, cut: list[tuple[int, int]]
) -> None:
    """ETIMEDOUT at both ends, also at those that only wait; afterwards new connections work."""
    receiver = cluster.node(2).submit(receive_until_told, PORT, 2)
    bystander = cluster.node(3).submit(receive_until_told, PORT)
    for node in (2, 3):
        cluster.node(node).wait_for_port(PORT)
    sender = cluster.node(1).submit(send_until_told, "node2", PORT)
    waiter = cluster.node(1).submit(wait_until_told, "node2", PORT)
    other = cluster.node(1).submit(send_until_told, "node3", PORT)
    until(cluster.node(2), "ESTAB", 2)
    until(cluster.node(3), "ESTAB", 1)
    change(cluster, CUT, *cut)
    assert sender.result(TIMEOUT_S) == errno.ETIMEDOUT
    assert waiter.result(TIMEOUT_S) == errno.ETIMEDOUT
    assert receiver.result(TIMEOUT_S) == [("error", errno.ETIMEDOUT)] * 2
    assert cluster.node(1).python(connect, "node2", PORT) == errno.ETIMEDOUT
    assert observe.link_counters(cluster.name, *cut[0])["wire_dropped"] > 0
    assert max(observe.link_counters(cluster.name, *pair)["given_up"] for pair in ((1, 2), (2, 1))) > 0
    # Nobody else has noticed.
    assert other.process.poll() is None
    assert bystander.process.poll() is None
    other.process.kill()
    (how, _count) = bystander.result(TIMEOUT_S)[0]
    assert how == "end"
    changes = {pair: observe.link_counters(cluster.name, *pair)["wire_changes"] for pair in cut}
    change(cluster, {}, *cut)
    while any(observe.link_counters(cluster.name, *pair)["wire_changes"] == changes[pair] for pair in cut):
        pass
    receiver = cluster.node(2).submit(receive_until_told, PORT)
    cluster.node(2).wait_for_port(PORT)
    assert cluster.node(1).python(connect, "node2", PORT) == 0
    assert receiver.result(TIMEOUT_S) == [("end", 0)]


def test_a_transfer_to_a_node_that_is_given_up_fails_and_a_later_one_arrives(cluster: Cluster) -> None:
    """The import stays good."""
    with (
        vmmc_emu.attach(4, cluster=cluster.name) as here,
        vmmc_emu.attach(5, cluster=cluster.name) as there,
    ):
        export = there.export(there.alloc(4096), "buffer")
        target = here.import_(5, "buffer")
        source = here.alloc(4096)
        source[:] = b"1" * 4096
        changes = observe.link_counters(cluster.name, 4, 5)["wire_changes"]
        change(cluster, CUT, (4, 5))
        while observe.link_counters(cluster.name, 4, 5)["wire_changes"] == changes:
            pass
        # An OSError whose errno is ETIMEDOUT is a TimeoutError: so that it is not our own, no time is named.
        with pytest.raises(TimeoutError):
            target.send(source)
        with pytest.raises(TimeoutError):
            here.import_(5, "another")
        change(cluster, {}, (4, 5))
        source[:] = b"2" * 4096
        target.send(source, notify=True, timeout_ms=TIMEOUT_S * 1000)
        assert export.notification(TIMEOUT_S * 1000).length == 4096
        assert bytes(export.memory) == b"2" * 4096
        with pytest.raises(TimeoutError):
            export.notification(timeout_ms=0)


def test_a_node_is_cut_off_before_it_ever_talked(cluster: Cluster) -> None:
    """The first word to a node goes over the wire as well; and so does the first word afterwards."""
    change(cluster, CUT, (6, 7), (7, 6))
    for node in (6, 7):
        while "is cut" not in cluster.node(node).logs():
            pass
    assert cluster.node(6).python(connect, "node7", PORT) == errno.ETIMEDOUT
    change(cluster, {}, (6, 7), (7, 6))
    for node in (6, 7):
        while "is perfect" not in cluster.node(node).logs():
            pass
    assert cluster.node(6).python(connect, "node7", PORT) == errno.ECONNREFUSED


def wait_kept_alive(host: str, port: int) -> int:
    """The same with SO_KEEPALIVE, as impatient as it can be."""
    with socket.create_connection((host, port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
            connection.setsockopt(socket.IPPROTO_TCP, option, 1)
        try:
            connection.recv(1)
        except OSError as error:
            return error.errno or 0
    return 0


# Fills the link to node2 with packets of one byte, until it is told that node2 is given up.  The connect that
# follows uses the same slot.
CROWDS = f"""
import fcntl, socket, struct, sys, termios
SIOCOUTQNSD = 0x894B
crowding = socket.create_connection(("node2", {PORT}))
crowding.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
print("connected", flush=True)
sys.stdin.readline()
try:
    while True:
        crowding.send(b"x")
        while fcntl.ioctl(crowding, SIOCOUTQNSD, bytes(4)) != bytes(4):
            error = crowding.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error: raise OSError(error, "")
except OSError as error:
    print(error.errno, flush=True)
crowding.close()
for i in range(3):
    with socket.create_connection(("node3", {PORT})) as connection:
        connection.sendall(b"hello")
        print(connection.recv(5).decode(), flush=True)
sys.stdin.readline()
"""

ANSWERS = f"""
import socket
listener = socket.create_server(("", {PORT}))
print("ready", flush=True)
while True:
    connection = listener.accept()[0]
    connection.sendall(connection.recv(18))
"""


def test_what_waited_for_a_full_link_goes_to_another_node_now(cluster: Cluster) -> None:
    """A slot and a command place that were left in the queue of a link that is given up are used again."""
    pipe = subprocess.PIPE
    with contextlib.ExitStack() as stack:

        def start(node: int, program: str) -> subprocess.Popen[str]:
            process = cluster.node(node).popen(
                [sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        def line(process: subprocess.Popen[str]) -> str:
            assert process.stdout is not None
            return process.stdout.readline().strip()

        for node in (2, 3):
            assert line(start(node, ANSWERS)) == "ready"
        here, there, elsewhere = (
            stack.enter_context(vmmc_emu.attach(node, cluster=cluster.name)) for node in (1, 2, 3)
        )
        inboxes = [end.export(end.alloc(4096), "inbox") for end in (there, elsewhere)]
        to_there, to_elsewhere = (here.import_(node, "inbox", timeout_ms=TIMEOUT_S * 1000) for node in (2, 3))
        crowd = start(1, CROWDS)
        assert line(crowd) == "connected"
        changes = observe.link_counters(cluster.name, 1, 2)["wire_changes"]
        change(cluster, CUT, (1, 2))
        while observe.link_counters(cluster.name, 1, 2)["wire_changes"] == changes:
            pass
        print(file=crowd.stdin, flush=True)
        assert line(crowd) == str(errno.ETIMEDOUT)
        assert [line(crowd) for _ in range(3)] == ["hello"] * 3
        source = here.alloc(4096)
        source[:5] = b"lost."
        with pytest.raises(TimeoutError):
            to_there.send(source[:5])
        source[:5] = b"here!"
        for _ in range(300):  # each place of the command queue
            to_elsewhere.send(source[:5], timeout_ms=TIMEOUT_S * 1000)
        change(cluster, {}, (1, 2))
        to_there.send(source[:0], notify=True, timeout_ms=TIMEOUT_S * 1000)
        assert inboxes[0].notification(TIMEOUT_S * 1000).length == 0
        assert [bytes(inbox.memory[:5]) for inbox in inboxes] == [bytes(5), b"here!"]


def send_to_the_silent(silent: str, nic: int, other: str, port: int) -> int:
    """Sends to a peer whose NIC stands still until it is told, then to another; runs on a node."""
    with socket.create_connection((silent, port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
            connection.setsockopt(socket.IPPROTO_TCP, option, 1)
        while Path(f"/proc/{nic}/stat").read_text().rpartition(") ")[2][0] != "T":
            pass
        connection.sendall(b"for the silent one")
        try:
            connection.recv(1)
            told = 0
        except OSError as error:
            told = error.errno or 0
    for _ in range(4):  # one of them in the same slot, and its ring
        with socket.create_connection((other, port)) as connection:
            connection.sendall(b"for somebody else!")
            assert connection.recv(18) == b"for somebody else!"
    return told


def receive_bytes(port: int) -> bytes:
    """All that a connection brings, however it ends; runs on a node."""
    with socket.create_server(("", port)) as listener:
        connection, _ = listener.accept()
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(1 << 16):
            received += data
    return received


def test_who_was_silent_does_not_get_what_another_connection_says(cluster: Cluster) -> None:
    """Bytes that it had yet to copy when their connection was given up are nobody's."""
    silent = cluster.node(2).submit(receive_bytes, PORT)
    other = cluster.node(3).popen([sys.executable, "-c", ANSWERS], stdout=subprocess.DEVNULL)
    for node in (2, 3):
        cluster.node(node).wait_for_port(PORT)
    nic = cluster.status()["nodes"][2]["nic_pid"]
    sender = None
    try:
        sender = cluster.node(1).submit(send_to_the_silent, "node2", nic, "node3", PORT)
        while not any(each.state == "ESTAB" for each in cluster.node(1).sockets()):
            pass
        os.kill(nic, signal.SIGSTOP)
        assert sender.result(TIMEOUT_S) == errno.ETIMEDOUT
    finally:
        os.kill(nic, signal.SIGCONT)
        other.kill()
        other.wait()
    assert silent.result(TIMEOUT_S) in (b"", b"for the silent one")


def test_keepalive_finds_a_peer_that_is_silent_on_a_perfect_wire(cluster: Cluster) -> None:
    """Nobody else would: its node stands still.  A peer that is there goes on being waited for."""
    receivers = [cluster.node(node).submit(receive_until_told, PORT) for node in (2, 3)]
    for node in (2, 3):
        cluster.node(node).wait_for_port(PORT)
    waiters = [cluster.node(1).submit(wait_kept_alive, f"node{node}", PORT) for node in (2, 3)]
    for node in (2, 3):
        until(cluster.node(node), "ESTAB", 1)
    nic = cluster.status()["nodes"][2]["nic_pid"]
    os.kill(nic, signal.SIGSTOP)
    try:
        assert waiters[0].result(TIMEOUT_S) == errno.ETIMEDOUT
    finally:
        os.kill(nic, signal.SIGCONT)
    assert waiters[1].process.poll() is None
    waiters[1].process.kill()
    assert receivers[0].result(TIMEOUT_S) == [("error", errno.ECONNRESET)]
    assert receivers[1].result(TIMEOUT_S) == [("end", 0)]
