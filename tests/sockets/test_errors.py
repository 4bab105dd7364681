"""Errors of socket calls: the same program over the kernel, within a node, and across nodes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from vmmc_emu import Cluster

CASES = (
    "refused", "refused_later", "in_progress", "is_connected", "not_connected", "broken_pipe", "own_end_shut",
    "reset_by_peer", "reset_by_linger", "address_in_use", "address_of_nobody", "would_block", "timeouts",
    "wrong_kind", "closed_descriptor",
)  # fmt: skip


def test_every_case_is_listed(program: Callable[..., str]) -> None:
    listed = subprocess.run([program("errors")], capture_output=True, text=True, check=True)
    assert tuple(listed.stdout.split()) == CASES


@pytest.mark.parametrize("case", CASES)
def test_kernel(case: str, program: Callable[..., str], echo_server: Callable[..., int]) -> None:
    """What the program expects is what Linux does."""
    command = [program("errors"), case, "127.0.0.1", str(echo_server())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("host", ["127.0.0.1", "node1"])
@pytest.mark.native
def test_vmmc(
    case: str, host: str, two_nodes: Cluster, program: Callable[..., str], echo_server: Callable[..., int]
) -> None:
    port = echo_server(two_nodes, 1 if host == "node1" else 0)
    command = [program("errors"), case, host, str(port)]
    done = two_nodes.node(0).run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")


CONNECT = """
import errno, socket, sys
try:
    socket.create_connection((sys.argv[1], 80), timeout=10)
except OSError as error:
    print(errno.errorcode[error.errno])
"""


@pytest.mark.parametrize("address", ["198.18.0.200", "fd00:766d:6d63::c8"])
def test_address_of_the_cluster_that_no_node_has(address: str, two_nodes: Cluster) -> None:
    done = two_nodes.node(0).run(
        ["python3", "-c", CONNECT, address], capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stdout == "EHOSTUNREACH\n"


def test_refusals_are_counted(two_nodes: Cluster) -> None:
    before = two_nodes.counters()["node1"]["connections_refused"]
    two_nodes.node(0).run(
        ["python3", "-c", CONNECT, "198.18.0.2"], capture_output=True, timeout=20, check=True
    )
    assert two_nodes.counters()["node1"]["connections_refused"] == before + 1


DATAGRAM = """
import errno, socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for call in (lambda: s.sendto(b"x", (sys.argv[1], 53)), lambda: s.connect((sys.argv[1], 53))):
    try:
        call()
        print("no error")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


def test_datagram_to_a_node(two_nodes: Cluster) -> None:
    """An error and one line that says why; no packet goes to the real network."""
    done = two_nodes.node(0).run(
        ["python3", "-c", DATAGRAM, "198.18.0.2"], capture_output=True, text=True, timeout=20, check=True
    )
    assert "no error" not in done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert "datagram" in done.stderr
