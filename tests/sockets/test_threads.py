"""Many threads and connections in one process, across nodes; every byte checked."""

from __future__ import annotations

import subprocess
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
