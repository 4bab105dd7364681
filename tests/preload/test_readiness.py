"""epoll, poll and select over VMMC sockets, compared with the kernel step by step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vmmc_emu import Cluster

PROGRAMS = Path(__file__).parent.parent / "programs"


@pytest.mark.parametrize("seed", range(1, 13))
def test_same_as_the_kernel(two_nodes: Cluster, seed: int) -> None:
    command = [sys.executable, str(PROGRAMS / "readiness.py"), str(seed), "300"]
    kernel = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    node = two_nodes.node(0).run(command, capture_output=True, text=True, timeout=60, check=True)
    assert node.stdout.splitlines() == kernel.stdout.splitlines()


def test_blocked_calls_are_woken(two_nodes: Cluster) -> None:
    done = two_nodes.node(0).run(
        [sys.executable, str(PROGRAMS / "waiting.py")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.native
def test_whom_an_event_wakes(two_nodes: Cluster, program: Callable[..., str]) -> None:
    command = [program("waking")]
    kernel = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (kernel.returncode, kernel.stdout, kernel.stderr) == (0, "ok\n", "")
    node = two_nodes.node(0).run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (node.returncode, node.stdout, node.stderr) == (0, "ok\n", "")


BY_TURNS = """
import os, select, socket
listener = socket.create_server(("", 0))
clients = [socket.create_connection(("127.0.0.1", listener.getsockname()[1])) for _ in range(2)]
select.select([listener], [], [])
sets = []
for _ in range(2):
    kernel, both = os.eventfd(1), select.epoll()
    both.register(listener, select.EPOLLIN)
    both.register(kernel, select.EPOLLIN)
    sets.append((both, kernel, {True: 0, False: 0}))
for number in range(400):
    both, kernel, seen = sets[number % 2]
    ((fd, _),) = both.poll(1, 1)
    seen[fd == kernel] += 1
for _, _, seen in sets:
    assert min(seen.values()) > 50, seen
"""


def test_small_room_is_shared_by_both_sides_of_each_set(two_nodes: Cluster) -> None:
    """Of a set with one ready socket and one ready kernel descriptor, looked at in turn with another."""
    two_nodes.node(0).run([sys.executable, "-c", BY_TURNS], timeout=60, check=True)
