"""Shared memory that goes away, or that there is none of: whoever asked is told, everybody else goes on."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmmc_emu import Cluster, Node, names, paths

PORT = 7300
TIMEOUT_S = 60


def until(condition: Callable[[], bool], why: Callable[[], object]) -> None:
    """Waits for what is to come."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, why()
        time.sleep(0.01)


SERVER = f"""
import socket, threading
listener = socket.create_server(("", {PORT}))
print("ready", flush=True)
def serve(connection):
    try:
        while data := connection.recv(65536): connection.sendall(data)
    except OSError as error: print("server:", error.strerror, flush=True)
while True: threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()
"""

CLIENT = f"""
import socket, sys
connection = socket.create_connection(("node1", {PORT}))
for line in sys.stdin:
    connection.sendall(line.encode())
    print(connection.recv(65536).decode(), end="", flush=True)
"""


def start(node: Node, program: str) -> subprocess.Popen[str]:
    """Talks over pipes; what it says of its own end is not asked for."""
    command = [sys.executable, "-c", program]
    pipe = subprocess.PIPE
    return node.popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def segments(cluster: Cluster, node: int, what: str) -> set[str]:
    """Names of a node's programs' segments of this kind."""
    return {name for name in cluster.place.segments() if f".node{node}.ep" in name and name.endswith(what)}


def exchange(client: subprocess.Popen[str], text: str) -> None:
    """There and back."""
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(text + "\n")
    client.stdin.flush()
    assert client.stdout.readline() == text + "\n"


@pytest.mark.parametrize("part", ["app", "nic", "own"])
def test_a_program_whose_memory_is_cut_short(two_nodes: Cluster, part: str) -> None:
    """Its peer is reset, its NIC says so and serves the other programs on, which lose nothing."""
    node0, node1 = two_nodes.nodes
    server = start(node1, SERVER)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    victim = start(node0, CLIENT)
    exchange(victim, "first")
    (segment,) = segments(two_nodes, 0, f".{part}")
    honest = start(node0, CLIENT)
    try:
        exchange(honest, "before")
        os.truncate(f"/dev/shm/{segment}", 4096 if part == "own" else 0)
        assert victim.stdin is not None
        victim.stdin.write("second\n")  # its library rings, or meets the hole itself
        victim.stdin.flush()
        for number in range(20):
            exchange(honest, f"after {number}")
        assert server.stdout.readline() == "server: Connection reset by peer\n"
        # Whoever looked first: the library, in the program that asked for it, or the NIC.
        until(
            lambda: (
                victim.poll() is not None or bool(re.search("is detached|cannot attach", two_nodes.logs()))
            ),
            two_nodes.logs,
        )
        exchange(honest, "still there")
    finally:
        for process in (victim, honest, server):
            process.kill()
            process.communicate()
    until(lambda: not segments(two_nodes, 0, "") | segments(two_nodes, 1, ""), two_nodes.logs)


# The segment of node1, what is done to it, and whose NIC is killed then, since one that runs has it mapped.
DAMAGE = [
    ("state", "remove", [1]),
    ("state", "cut", [1]),
    ("pub", "remove", [1]),
    ("pub", "cut", []),
    ("door", "remove", [1]),
    ("door", "cut", []),
    ("link.node0", "remove", [1]),
    ("link.node0", "remove", [0]),  # who finds it is the peer's next NIC
    ("link.node0", "remove", [0, 1]),
    ("link.node0", "cut", []),
]


@pytest.mark.parametrize(("segment", "how", "killed"), DAMAGE)
def test_a_node_whose_own_memory_goes(segment: str, how: str, killed: list[int]) -> None:
    """It is a machine whose memory failed: it is started anew, who talked to it hears of it, others go on."""
    with Cluster(nodes=3, name=f"damaged-{secrets.token_hex(4)}") as cluster:
        servers = [start(cluster.node(node), SERVER) for node in (1, 2)]
        for server in servers:
            assert server.stdout and server.stdout.readline() == "ready\n"
        talker = start(cluster.node(0), CLIENT)
        other = start(cluster.node(0), CLIENT.replace("node1", "node2"))
        for client in (talker, other):
            exchange(client, "before")
        path = paths.SHM / names.segment_name(cluster.name, 1, segment).removeprefix("/")
        if how == "remove":
            path.unlink()
        else:
            os.truncate(path, 0)
        for node in killed:
            os.kill(cluster.status()["nodes"][node]["nic_pid"], signal.SIGKILL)
        assert talker.stdin and talker.stdout
        talker.stdin.write("during\n")
        talker.stdin.flush()
        assert talker.stdout.readline() == ""  # an error ended it
        exchange(other, "after")
        # By its own NIC's account, or by that of a peer's, which may have found it out first.
        said = "node1: shared memory removed or truncated"
        until(
            lambda: (
                any("removed or truncated" in each["how"] for each in recent(cluster, 1))
                or said in str(cluster.logs())
            ),
            cluster.logs,
        )
        # With its node, or of what it found of it.
        assert servers[0].wait(TIMEOUT_S) in (-signal.SIGKILL, -signal.SIGBUS)
        until(lambda: cluster.status()["nodes"][1]["state"] == "up", cluster.logs)
        again = start(cluster.node(1), SERVER)
        assert again.stdout and again.stdout.readline() == "ready\n"
        exchange(start(cluster.node(0), CLIENT), "again")


@pytest.mark.parametrize("gone", [["door"], ["pub"], ["door", "pub", "state"]])
def test_a_nodes_memory_that_is_removed_while_its_nic_runs(gone: list[str]) -> None:
    """Who has it mapped goes on; who looks for it next, a NIC or a new program, finds out."""
    with Cluster(nodes=2, name=f"removed-{secrets.token_hex(4)}") as cluster:
        for segment in gone:
            (paths.SHM / names.segment_name(cluster.name, 1, segment).removeprefix("/")).unlink()
        looks = cluster.node(0 if gone == ["door"] else 1)
        look = "import socket\ntry: socket.create_connection(('node1', 9))\nexcept OSError: pass\n"
        looks.run([sys.executable, "-c", look], capture_output=True, timeout=TIMEOUT_S, check=False)
        until(lambda: "is started, for the 2. time" in cluster.logs(), cluster.logs)
        until(lambda: cluster.status()["nodes"][1]["state"] == "up", cluster.logs)
        server = start(cluster.node(1), SERVER)
        assert server.stdout and server.stdout.readline() == "ready\n"
        exchange(start(cluster.node(0), CLIENT), "again")


def recent(cluster: Cluster, node: int) -> list[dict[str, Any]]:
    """Why NICs of the node were replaced lately."""
    found: list[dict[str, Any]] = cluster.status()["nodes"][node]["restarts"]["nic"]["recent"]
    return found


def test_segments_that_are_removed(two_nodes: Cluster) -> None:
    """Their names are gone and the memory is not: what is connected goes on."""
    node0, node1 = two_nodes.nodes
    server = start(node1, SERVER)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    client = start(node0, CLIENT)
    try:
        exchange(client, "before")
        for name in segments(two_nodes, 0, "") | segments(two_nodes, 1, ""):
            Path("/dev/shm", name).unlink()
        for number in range(20):
            exchange(client, f"after {number}")
    finally:
        for process in (client, server):
            process.kill()
            process.communicate()


FLOOD = f"""
import os, signal
from vmmc_emu import Cluster
server = '''
import hashlib, os, socket, sys
listener = socket.create_server(("", {PORT}))
print("ready", flush=True)
connection = listener.accept()[0]
sys.stdin.readline()
digest = hashlib.sha256()
while data := connection.recv(65536): digest.update(data)
print(digest.hexdigest())
'''
client = '''
import errno, hashlib, socket, sys, time
full = False
connection = socket.create_connection(("node1", {PORT}))
print("connected", flush=True)
sys.stdin.readline()
digest = hashlib.sha256()
for i in range(200):
    data = i.to_bytes(4, "big") * 10000
    digest.update(data)
    while data:
        try: data = data[connection.send(data):]
        except OSError as error:
            assert error.errno == errno.ENOBUFS
            if not full: print("told", flush=True)
            full = True
            time.sleep(0.01)
print(digest.hexdigest())
'''
import subprocess, sys
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
with Cluster(nodes=2) as cluster:
    reader = cluster.node(1).popen([sys.executable, "-c", server], **pipes)
    assert reader.stdout.readline() == "ready\\n"
    writer = cluster.node(0).popen([sys.executable, "-c", client], **pipes)
    assert writer.stdout.readline() == "connected\\n"
    with open("/dev/shm/filler", "wb", buffering=0) as filler:
        for size in (1 << 16, 4096):
            try:
                while filler.write(bytes(size)): pass
            except OSError: pass
    for process in (writer, reader):
        process.stdin.write("go\\n")
        process.stdin.flush()
    assert writer.stdout.readline() == "told\\n"
    # Its successor finds no room either, and goes on with the programs all the same.
    for number, node in enumerate(cluster.status()["nodes"]):
        os.kill(node["nic_pid"], signal.SIGKILL)
        while cluster.status()["nodes"][number]["nic_pid"] in (node["nic_pid"], None): pass
    os.unlink("/dev/shm/filler")
    sent, received = (process.communicate(timeout=40)[0].strip() for process in (writer, reader))
    print("equal" if sent == received else (sent, received), cluster.logs().count("incarnation 2"))
"""


# Everything that takes memory, with none left and with some again: what was there before goes on.
FULL = f"""
import errno, os, socket, subprocess, sys
import vmmc_emu
from vmmc_emu import Cluster
program = '''
import errno, socket, sys
import vmmc_emu
said = []
def told(call):
    try: call()
    except OSError as error: return errno.errorcode[error.errno]
    return "fine"
listener = socket.create_server(("", {PORT}))
near = socket.create_connection(("node0", {PORT}))
far, _ = listener.accept()
near.sendall(b"first") # its ring has a page from here on
assert far.recv(5) == b"first"
held = []
def more_listeners():
    for i in range(64): held.append(socket.create_server(("", 0)))
def more_connections():
    for i in range(64):
        held.append(socket.create_connection(("node0", {PORT})))
        held.append(listener.accept()[0])
endpoint = vmmc_emu.attach()
memory = endpoint.alloc(1 << 20)
def export(): held.append(endpoint.export(memory))
print("ready", flush=True)
for line in sys.stdin:
    near.sendall(b"still")
    assert far.recv(5) == b"still"
    print(told(more_listeners), told(more_connections), told(export), flush=True)
    held.clear()
'''
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
with Cluster(nodes=1) as cluster:
    process = cluster.node(0).popen([sys.executable, "-P", "-c", program], **pipes)
    def ask():
        process.stdin.write("go\\n")
        process.stdin.flush()
        print(process.stdout.readline(), end="")
    assert process.stdout.readline() == "ready\\n"
    with open("/dev/shm/filler", "wb", buffering=0) as filler:
        for size in (1 << 16, 4096):
            try:
                while filler.write(bytes(size)): pass
            except OSError: pass
        for pages in (0, 1, 2, 3, 5, 8, 13, 21, 34): # where it ends is another place each time
            filler.truncate(filler.tell() - pages * 4096)
            ask()
    os.unlink("/dev/shm/filler")
    ask()
    process.stdin.close()
    print(process.wait(30), cluster.logs().count("incarnation"))
"""


def in_small_memory(with_own_mounts: list[str], script: str) -> str:
    """Runs Python with a /dev/shm of its own, of 8 MiB: what it prints, errors included."""
    mount = 'mount -t tmpfs -o size=8m,mode=1777 tmpfs /dev/shm && exec "$0" -P -c "$1"'
    done = subprocess.run(
        [*with_own_mounts, "sh", "-c", mount, sys.executable, script],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_no_room_for_anything_new(with_own_mounts: list[str]) -> None:
    """Sockets, connections and exports are refused for want of memory, and made once there is some."""
    *full, with_room, end = in_small_memory(with_own_mounts, FULL).splitlines()
    assert len(full) == 9, full
    assert full[0] == "ENOBUFS ENOBUFS ENOMEM"
    told = {each for line in full for each in line.split()}
    assert told <= {"ENOBUFS", "ENOMEM", "ECONNREFUSED", "fine"}, full
    assert with_room == "fine fine fine"
    assert end == "0 1"


def test_no_room_for_what_a_stream_could_have(with_own_mounts: list[str]) -> None:
    """While /dev/shm is full a sender is told, nothing is lost, also when NICs die; with room it goes on."""
    assert in_small_memory(with_own_mounts, FLOOD) == "equal 2\n"
