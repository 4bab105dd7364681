"""Threads cancelled in calls; signal handlers that make calls, or leave them by longjmp: as the kernel."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from vmmc_emu import Cluster


@pytest.mark.native
@pytest.mark.parametrize("name", ["cancel", "handlers", "jumps", "raw_calls"])
def test_c_program(name: str, two_nodes: Cluster, program: Callable[..., str]) -> None:
    command = [program(name)]
    kernel = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (kernel.returncode, kernel.stdout, kernel.stderr) == (0, "ok\n", "")
    node = two_nodes.node(0).run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (node.returncode, node.stdout, node.stderr) == (0, "ok\n", "")
