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
