"""A program that lives and that its NIC serves no more: all its calls end, and it is told why."""

from __future__ import annotations

import mmap
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vmmc_emu import Cluster

PROGRAM = Path(__file__).parent.parent / "programs" / "detached.py"
COMMAND_TAIL = 192  # in struct vmmc_app_header
TIMEOUT_S = 60

EchoServer = Callable[..., int]

ENDED = """\
accept again: ENETDOWN
accept: ENETDOWN
bind: ENETDOWN
child: 0
connect: ENETDOWN
epoll and pipe: [True]
epoll listener: [True]
epoll: [True]
import: ENETDOWN
listen: ENETDOWN
notification: ENETDOWN
recv: ECONNRESET
send: ECONNRESET
"""


def talk_nonsense(cluster: Cluster, segment: str) -> None:
    """The program asks for an impossible number of commands."""
    with open(f"/dev/shm/{segment}.app", "r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:
        struct.pack_into("=Q", memory, COMMAND_TAIL, 1 << 40)
    # Whoever attaches makes the NIC look.
    cluster.node(0).run([sys.executable, "-c", "import socket; socket.create_server(('', 0))"], check=True)


def lose_what_the_nic_knew(cluster: Cluster, segment: str) -> None:
    """A NIC dies, and its successor cannot attach the program."""
    os.truncate(f"/dev/shm/{segment}.own", 4096)
    nic = cluster.status()["nodes"][0]["nic_pid"]
    assert nic is not None
    os.kill(nic, signal.SIGKILL)


@pytest.mark.parametrize(
    ("happens", "why"),
    [
        (talk_nonsense, "an impossible number of commands"),
        (lose_what_the_nic_knew, "its NIC cannot attach it"),
    ],
)
def test_everything_that_waits_ends(
    two_nodes: Cluster, echo_server: EchoServer, happens: Callable[[Cluster, str], None], why: str
) -> None:
    """Waiting calls and new ones get an errno, stderr one line that says why; a fork has a network again."""
    port = echo_server(two_nodes, 1)
    before = {name for name in two_nodes.place.segments() if ".node0.ep" in name}
    pipe = subprocess.PIPE
    process = two_nodes.node(0).popen(
        [sys.executable, str(PROGRAM), str(port)], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        (segment,) = {
            name.removesuffix(".app")
            for name in two_nodes.place.segments()
            if ".node0.ep" in name and name.endswith(".app") and name not in before
        }
        happens(two_nodes, segment)
        out, err = process.communicate("go\n", timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.communicate()
    said = {line for line in out.splitlines() if not line.startswith("poll: ")}
    assert said == set(ENDED.splitlines()), (out, err, two_nodes.logs())
    assert re.search(r"^poll: [12]$", out, re.MULTILINE), out
    assert len(err.splitlines()) == 1, err
    assert f"is detached from node0 and has no network any more: {why}" in err


CROWDED = """
import socket, sys
listener = socket.socket()
listener.bind(("", 7200))
listener.listen(0)
print("ready", flush=True)
sys.stdin.read()
"""
CROWD = """
import errno, socket
held = []
try:
    while True:
        held.append(socket.create_connection(("node0", 7200)))
        print("connected", flush=True)
except OSError as error: print(errno.errorcode[error.errno], flush=True)
"""


def test_connects_that_wait_for_its_backlog(two_nodes: Cluster) -> None:
    """Its backlog is full: who waits for room is refused when the program is detached."""
    pipe = subprocess.PIPE
    before = set(two_nodes.place.segments())
    server = two_nodes.node(0).popen([sys.executable, "-c", CROWDED], stdin=pipe, stdout=pipe, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    (segment,) = {name for name in set(two_nodes.place.segments()) - before if name.endswith(".app")}
    client = two_nodes.node(1).popen([sys.executable, "-c", CROWD], stdout=pipe, text=True)
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "connected\n"
        while not any(socket.state == "SYN-SENT" for socket in two_nodes.node(1).sockets()):
            pass
        talk_nonsense(two_nodes, segment.removesuffix(".app"))
        assert client.communicate(timeout=TIMEOUT_S)[0].splitlines()[-1] == "ECONNREFUSED"
    finally:
        for process in (server, client):
            process.kill()
            process.communicate()
