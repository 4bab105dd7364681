"""A peer that does not answer for too long is given up: whoever waits for it is told, and nobody else."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Iterator
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
