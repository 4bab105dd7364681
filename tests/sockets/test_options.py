"""Options that mean little without a kernel's TCP are granted, refused and kept as the kernel does."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from vmmc_emu import Cluster

PROGRAM = Path(__file__).parent.parent / "programs" / "options.py"


def loopbacks() -> list[str]:
    """Those that this machine has."""
    found = ["127.0.0.1"]
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            found.append("::1")
    except OSError:
        pass  # a kernel without IPv6 has nothing to compare with
    return found


def who() -> str:
    """Root in a container is often no administrator of its network."""
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_DEBUG, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 63)
            sock.setsockopt(socket.IPPROTO_IP, 19, 1)  # IP_TRANSPARENT
        except PermissionError:
            return "user"
    return "administrator"


def test_options(two_nodes: Cluster) -> None:
    command = [sys.executable, str(PROGRAM), who(), *loopbacks()]
    kernel = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    node = two_nodes.node(0).run(command, capture_output=True, text=True, timeout=60, check=True)
    assert kernel.stdout.count("new") >= 35
    assert node.stdout.splitlines() == kernel.stdout.splitlines()
