"""Programs that ask files, or rings, for what others ask the C library."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmmc_emu import Cluster

pytestmark = pytest.mark.native

HOSTS = "198.18.0.1\tnode0\nfd00:766d:6d63::1\tnode0\n198.18.0.2\tnode1\nfd00:766d:6d63::2\tnode1\n"
INTERFACES = (
    "00000000000000000000000000000001 01 80 10 80       lo\n"
    "fd00766d6d6300000000000000000002 02 40 00 80    vmmc0\n"
)
WAYS = ["open", "openat close-on-exec", "fopen close-on-exec"]


def told(cluster: Cluster | None, *command: str) -> str:
    run = cluster.node(1).run if cluster else subprocess.run
    return run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/etc/hosts", HOSTS + Path("/etc/hosts").read_text()),
        ("/proc/net/if_inet6", INTERFACES),
        ("/proc/sys/kernel/hostname", "node1\n"),
    ],
)
def test_files(two_nodes: Cluster, program: Callable[..., str], path: str, text: str) -> None:
    expected = "".join(f"== {way}\n{text}" for way in WAYS) + "== -1 Bad address\n"
    assert told(two_nodes, program("around"), path) == expected


def test_files_off_the_nodes_are_the_machines(program: Callable[..., str]) -> None:
    text = Path("/etc/hosts").read_text()
    expected = "".join(f"== {way}\n{text}" for way in WAYS) + "== -1 Bad address\n"
    assert told(None, program("around"), "/etc/hosts") == expected


def test_other_files_are_left_alone(two_nodes: Cluster, tmp_path: Path) -> None:
    """Also those whose names begin alike."""
    (tmp_path / "hosts").write_text("mine\n")
    script = f"cat {tmp_path}/hosts; cat /etc/hosts.equiv 2>&1; cd /etc && cat passwd"
    assert told(two_nodes, "sh", "-c", script) == told(None, "sh", "-c", script)


def test_a_kernel_with_ipv6_says_it_in_the_same_form() -> None:
    """What the node's file says, in the words of this machine's."""
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    loopback = [line for line in Path("/proc/net/if_inet6").read_text().splitlines() if line.endswith(" lo")]
    if not loopback:
        pytest.skip("this machine's loopback has no IPv6")
    assert loopback == INTERFACES.splitlines()[:1]


def test_there_are_no_rings(two_nodes: Cluster, program: Callable[..., str]) -> None:
    """They would go around VMMC; programs that can use them do without where there are none."""
    assert told(two_nodes, program("around")) == "-1 Function not implemented\nFunction not implemented\n"
