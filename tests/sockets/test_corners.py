"""Corners of stream sockets: programs over the kernel and on a node; who reaches loopback addresses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from vmmc_emu import Cluster

CORNERS = (
    "closed_while_asleep", "closed_while_accepting", "closed_in_epoll", "large_numbers", "lingers",
    "lingers_in_vain", "many_pieces", "many_messages", "files", "shared_port", "ended_by_a_third",
    "ended_in_a_race", "many_sleepers", "streams", "over_stdio", "all_closed", "urgent",
)  # fmt: skip
MEANWHILE = (
    "kernel_member_added", "cancelled", "handlers", "thrown_away", "watched_since_connecting", "numbers",
    "low_water", "given_up",
)  # fmt: skip
CASES = [("corners", case) for case in CORNERS] + [("meanwhile", case) for case in MEANWHILE]
ON_PURPOSE = "not as the kernel:"  # what a case prints before what differs
URGENT = [  # urgent data is refused, by each call that could send it, and nothing of it arrives
    *3 * ["-1 EOPNOTSUPP"],
    "0 ",
    "-1 EAGAIN",
]


@pytest.mark.parametrize(("name", "cases"), [("corners", CORNERS), ("meanwhile", MEANWHILE)])
def test_every_case_is_listed(name: str, cases: tuple[str, ...], program: Callable[..., str]) -> None:
    listed = subprocess.run([program(name)], capture_output=True, text=True, check=True)
    assert tuple(listed.stdout.split()) == cases


@pytest.mark.native
@pytest.mark.parametrize(("name", "case"), CASES)
def test_same_as_the_kernel(
    name: str, case: str, two_nodes: Cluster, program: Callable[..., str]
) -> None:
    command = [program(name), case]
    kernel = subprocess.run(
        command, input="1 early line\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert (kernel.returncode, kernel.stderr) == (0, "")
    node = two_nodes.node(0).run(
        command, input="1 early line\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert (node.returncode, node.stderr) == (0, "")
    same, _, differs = node.stdout.partition(ON_PURPOSE)
    assert same.splitlines() == kernel.stdout.partition(ON_PURPOSE)[0].splitlines()
    assert [line.rpartition(": ")[2] for line in differs.splitlines()[1:]] == (URGENT if differs else [])


def test_given_up_with_its_address_posted(two_nodes: Cluster, program: Callable[..., str]) -> None:
    """The same where the NIC writes into the program's own memory."""
    command = [program("meanwhile"), "given_up"]
    kernel = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    node = two_nodes.node(0).run(command, env={"VMMC_REDIRECT_ORDINARY": "1"}, timeout=60, check=True)
    assert node.stdout.splitlines() == kernel.stdout.splitlines()


LISTENER = """
import select, socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.create_server((sys.argv[1], 0), family=family) as listener:
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()
"""
CONNECT = """
import errno, socket, sys
for address in sys.argv[2:]:
    try:
        socket.create_connection((address, int(sys.argv[1])), timeout=20).close()
        print(address, "reached")
    except OSError as error:
        print(address, errno.errorcode[error.errno])
"""
NODE0, NODE0_V6 = "198.18.0.1", "fd00:766d:6d63::1"


@pytest.mark.parametrize(
    ("bound", "near", "far"),
    [
        ("127.0.0.1", {"127.0.0.1"}, set()),
        ("::1", {"::1"}, set()),
        ("0.0.0.0", {"127.0.0.1", NODE0}, {NODE0}),
        ("::", {"::1", NODE0_V6}, {NODE0_V6}),
        (NODE0, {NODE0}, {NODE0}),
    ],
)
def test_who_reaches_a_listener(bound: str, near: set[str], far: set[str], two_nodes: Cluster) -> None:
    """A loopback address is its node's own: others are refused, there and at the node's address."""
    with two_nodes.node(0).popen(
        [sys.executable, "-c", LISTENER, bound], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as listener:
        assert listener.stdout is not None
        port = listener.stdout.readline().strip()
        addresses = ["127.0.0.1", "::1", NODE0, NODE0_V6]
        for node, reached in ((0, near), (1, far)):
            done = two_nodes.node(node).run(
                [sys.executable, "-c", CONNECT, port, *addresses],
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            )
            answers = dict(line.split() for line in done.stdout.splitlines())
            assert answers == {each: "reached" if each in reached else "ECONNREFUSED" for each in addresses}


RECEIVER = """
import socket
with socket.create_server(("", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    connection, _ = listener.accept()
while data := connection.recv(100):
    print(data)
"""
SPEAKER = """
import ctypes, os, socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    os.dup2(connection.fileno(), 1)
ctypes.CDLL(None).printf(b"number %d", 7)
"""


def test_what_stdout_has_at_exit_is_sent(two_nodes: Cluster) -> None:
    """A socket over standard output: what the C library's buffer holds goes out when the program ends."""
    with two_nodes.node(0).popen(
        [sys.executable, "-c", RECEIVER], stdout=subprocess.PIPE, text=True
    ) as receiver:
        assert receiver.stdout is not None
        port = receiver.stdout.readline().strip()
        two_nodes.node(1).run([sys.executable, "-c", SPEAKER, "node0", port], timeout=60, check=True)
        assert receiver.stdout.read() == "b'number 7'\n"
