"""Idle connections over wires that take time: what NICs say to each other then crosses what programs say."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from vmmc_emu import Cluster, wires
from vmmc_emu.wires import Change

PORT = 7000
CONNECTIONS = 32
IDLE_S = (0.45, 1.15)  # a NIC finds a connection idle, and asks for unused credit, after half a second to one
DELAY = {"delay_ns": 40_000_000}
ANSWERS = (5000, 30_000, 60_000, 100_000, 200_000)  # bytes
TIMEOUT_S = 30


@pytest.fixture
def cluster(two_nodes: Cluster) -> Iterator[Cluster]:
    """Two nodes whose wires are perfect before and after."""
    yield two_nodes
    change(two_nodes, {})


def change(cluster: Cluster, settings: dict[str, int]) -> None:
    """Both wires, and nothing of what they were before."""
    wires.change(cluster.place, [Change([a], [1 - a], settings, reset=True) for a in (0, 1)])


def answer(connection: socket.socket) -> None:
    """For each four bytes, as many as they say."""
    with connection:
        while length := connection.recv(4, socket.MSG_WAITALL):
            connection.sendall(bytes(int.from_bytes(length, "big")))


def serve() -> None:
    """Answers on all connections; runs on a node."""
    with socket.create_server(("", PORT), backlog=CONNECTIONS) as listener:
        accepted = [listener.accept()[0] for _ in range(CONNECTIONS)]
    answering = [threading.Thread(target=answer, args=(each,)) for each in accepted]
    for each in answering:
        each.start()
    for each in answering:
        each.join()


def ask(connection: socket.socket, length: int) -> None:
    """Asks for so many bytes."""
    connection.sendall(length.to_bytes(4, "big"))
    while length:
        received = len(connection.recv(length))
        assert received
        length -= received


def ask_again(host: str) -> int:
    """Asks on each connection, is idle, and asks once more; how many were answered.  Runs on a node."""
    answered = []

    def one(number: int) -> None:
        connection = socket.create_connection((host, PORT), TIMEOUT_S)
        with connection, contextlib.suppress(TimeoutError):
            for i in (number, number // 5):
                ask(connection, ANSWERS[i % len(ANSWERS)])
            time.sleep(IDLE_S[0] + (IDLE_S[1] - IDLE_S[0]) * number / CONNECTIONS)
            ask(connection, 100_000)
            answered.append(number)

    asking = [threading.Thread(target=one, args=(number,)) for number in range(CONNECTIONS)]
    for each in asking:
        each.start()
    for each in asking:
        each.join()
    return len(answered)


def test_asked_for_credit_while_it_is_used(cluster: Cluster) -> None:
    """A program goes on sending while its NIC, which found the connection idle, has the peer's asked for the
    credit back: what is told with the bytes, which come later, holds."""
    change(cluster, DELAY)
    serving = cluster.node(1).submit(serve)
    while not any(each.state == "LISTEN" and each.port == PORT for each in cluster.node(1).sockets()):
        pass
    answered = cluster.node(0).python(ask_again, "node1")
    assert answered == CONNECTIONS
    serving.result()
