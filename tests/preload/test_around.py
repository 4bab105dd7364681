"""Programs that ask files, or rings, for what others ask the C library."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmmc_emu import Cluster

HOSTS = "198.18.0.1\tnode0\nfd00:766d:6d63::1\tnode0\n198.18.0.2\tnode1\nfd00:766d:6d63::2\tnode1\n"
INTERFACES = (
    "00000000000000000000000000000001 01 80 10 80       lo\n"
    "fd00766d6d6300000000000000000002 02 40 00 80    vmmc0\n"
)
WAYS = ["open", "openat close-on-exec", "fopen close-on-exec"]


def told(cluster: Cluster | None, *command: str) -> str:
    run = cluster.node(1).run if cluster else subprocess.run
    return run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.native
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/etc/hosts", HOSTS + Path("/etc/hosts").read_text()),
        ("/proc/net/if_inet6", INTERFACES),
    ],
)
def test_files(two_nodes: Cluster, program: Callable[..., str], path: str, text: str) -> None:
    expected = "".join(f"== {way}\n{text}" for way in WAYS) + "== -1 Bad address\n"
    assert told(two_nodes, program("around"), path) == expected


def test_a_file_is_what_stat_says_that_it_is(two_nodes: Cluster, tmp_path: Path) -> None:
    """cp(1) looks before and after it opens; a reader may take the size for its word."""
    script = (
        f"cp /etc/hosts {tmp_path}/copy && cmp /etc/hosts {tmp_path}/copy && stat -c %s /etc/hosts"
        f" && wc -c < {tmp_path}/copy && stat -Lc %i /etc/hosts && ls -i /etc/hosts | cut -d' ' -f1"
    )
    size, copied, inode, listed = told(two_nodes, "sh", "-c", script).split()
    assert size == copied == str(len(HOSTS + Path("/etc/hosts").read_text()))
    assert inode == listed != str(Path("/etc/hosts").stat().st_ino)


@pytest.mark.native
def test_the_machines_file_is_found_where_the_clusters_is_gone(
    two_nodes: Cluster, program: Callable[..., str]
) -> None:
    two_nodes.place.hosts.rename(two_nodes.place.hosts.with_suffix(".away"))
    try:
        text = Path("/etc/hosts").read_text()
        expected = "".join(f"== {way}\n{text}" for way in WAYS) + "== -1 Bad address\n"
        assert told(two_nodes, program("around"), "/etc/hosts") == expected
    finally:
        two_nodes.place.hosts.with_suffix(".away").rename(two_nodes.place.hosts)


def test_main_begins_without_an_error(two_nodes: Cluster, program: Callable[..., str]) -> None:
    assert told(two_nodes, program("around")).splitlines()[0] == "0"


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


@pytest.mark.native
def test_there_are_no_rings(two_nodes: Cluster, program: Callable[..., str]) -> None:
    """They would go around VMMC; programs that can use them do without where there are none."""
    refused = ["-1 Function not implemented", "Function not implemented"]
    assert told(two_nodes, program("around")).splitlines()[1:] == refused
