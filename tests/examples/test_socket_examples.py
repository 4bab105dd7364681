"""The examples for sockets, run as a reader would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=EXAMPLES,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_web_servers() -> None:
    assert run(EXAMPLES / "web_servers.py").startswith("this is node0; this is node1; this is node2;\n")


def test_functions_on_nodes() -> None:
    assert run(EXAMPLES / "functions_on_nodes.py").splitlines() == [
        "node1 sent 10 from 198.18.0.2",
        "node2 sent 20 from 198.18.0.3",
        "node3 sent 30 from 198.18.0.4",
        "the server on node0 adds up: 60",
    ]


def test_with_pytest() -> None:
    assert "2 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLES / "test_with_pytest.py")
