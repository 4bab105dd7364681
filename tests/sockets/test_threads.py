"""Many threads and connections in one process, across nodes; every byte checked."""

from __future__ import annotations

import select
import socket
import subprocess
import threading
from collections.abc import Callable

import pytest

from vmmc_emu import Cluster

CASES = (
    "many_connections", "both_directions", "accept_in_many_threads", "epoll_in_many_threads",
    "shutdown_wakes_a_receiver",
)  # fmt: skip


def test_every_case_is_listed(program: Callable[..., str]) -> None:
    listed = subprocess.run([program("threads")], capture_output=True, text=True, check=True)
    assert tuple(listed.stdout.split()) == CASES


@pytest.mark.native
@pytest.mark.parametrize("case", CASES)
def test_threads(
    case: str, two_nodes: Cluster, program: Callable[..., str], echo_server: Callable[..., int]
) -> None:
    command = [program("threads"), case, "node1", str(echo_server(two_nodes, 1))]
    done = two_nodes.node(0).run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def polled_while_connecting(rounds: int) -> int:
    """One thread connects while another looks at its socket, which has not hung up before it is connected."""
    listener = socket.create_server(("127.0.0.1", 0))
    wrong = 0
    for _ in range(rounds):
        with socket.socket() as client:
            thread = threading.Thread(target=client.connect, args=(listener.getsockname(),))
            thread.start()
            listener.accept()[0].close()
            # The peer's end may come before the connecting thread has run again: never an unconnected socket.
            readable = select.select([client], [], [], 60)[0]
            try:
                wrong += not readable or client.recv(1) != b""
            except OSError:
                wrong += 1
            thread.join()
    return wrong


def test_polled_while_connecting(two_nodes: Cluster) -> None:
    assert two_nodes.node(0).python(polled_while_connecting, 200) == 0
