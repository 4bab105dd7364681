"""How connections end: every order of shutdown, close, reset and a few bytes, as over the kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vmmc_emu import Cluster

PROGRAMS = Path(__file__).parent.parent / "programs"


@pytest.mark.parametrize("program", [["ends.py", "3"], ["used_after_fork.py"]], ids=lambda p: p[0])
def test_same_as_the_kernel(program: list[str], two_nodes: Cluster) -> None:
    command = [sys.executable, str(PROGRAMS / program[0]), *program[1:]]
    kernel = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    node = two_nodes.node(0).run(command, capture_output=True, text=True, timeout=60, check=True)
    assert node.stdout.splitlines() == kernel.stdout.splitlines()
