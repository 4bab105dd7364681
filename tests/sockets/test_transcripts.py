"""Transcripts that must be the kernel's: how connections end in every order, calls that make no sense."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vmmc_emu import Cluster

PROGRAMS = Path(__file__).parent.parent / "programs"


TRANSCRIPTS = [
    ["ends.py", "3"],
    ["ends.py", "2", "edges"],
    ["used_after_fork.py"],
    ["nonsense.py"],
    ["ports.py"],
]


@pytest.mark.parametrize("program", TRANSCRIPTS, ids=" ".join)
def test_same_as_the_kernel(program: list[str], two_nodes: Cluster) -> None:
    command = [sys.executable, str(PROGRAMS / program[0]), *program[1:]]
    kernel = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    node = two_nodes.node(0).run(command, capture_output=True, text=True, timeout=60, check=True)
    assert node.stdout.splitlines() == kernel.stdout.splitlines()


# AddressSanitizer's own versions of these calls read what the program names: bad addresses end there.
@pytest.mark.skipif(os.environ.get("SANITIZE") == "address", reason="its interceptors read the bad addresses")
@pytest.mark.native
@pytest.mark.parametrize("name", ["unmapped", "refused"])
def test_bad_arguments_as_in_the_kernel(name: str, two_nodes: Cluster, program: Callable[..., str]) -> None:
    same_as_the_kernel([program(name)], two_nodes)


@pytest.mark.native
def test_what_a_peer_finds_as_in_the_kernel(two_nodes: Cluster, program: Callable[..., str]) -> None:
    """The other end died or closed at a bad moment."""
    same_as_the_kernel([program("left_behind")], two_nodes)


@pytest.mark.native
def test_what_is_sent_within_a_node_is_there_at_once(two_nodes: Cluster, program: Callable[..., str]) -> None:
    """All of it, but where a NIC gets no core for long: without being waited for, 0 to 700 of 1000 were."""
    said = two_nodes.node(0).run([program("at_once")], timeout=60, check=True).stdout
    found = [int(number) for number in re.findall(r"\d+", said)]
    assert found.pop() == 1000
    assert min(found) > 900, said


def same_as_the_kernel(command: list[str], two_nodes: Cluster) -> None:
    kernel = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (kernel.returncode, kernel.stderr) == (0, "")
    node = two_nodes.node(0).run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (node.returncode, node.stderr) == (0, "")
    assert node.stdout.splitlines() == kernel.stdout.splitlines()
