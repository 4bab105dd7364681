"""Limits of descriptors: who is at its own gets EMFILE, loses nothing, and holds up nobody."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from vmmc_emu import Cluster

PORT = 7400
TIMEOUT_S = 60

# At its limit, with connections queued before and while it is: each is there once there is room for it.
SERVER = f"""
import errno, os, resource, select, socket, sys
listener = socket.create_server(("", {PORT}))
print("ready", flush=True)
sys.stdin.readline()
def code(call):
    try: call()
    except OSError as error: return errno.errorcode[error.errno]
    return "fine"
poll = select.poll()
poll.register(listener, select.POLLIN)
assert poll.poll(30000)
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
filled = []
try:
    while True: filled.append(os.dup(0))
except OSError: pass
print(code(socket.socket), code(listener.accept), code(select.epoll), flush=True)
listener.setblocking(False)
print(code(listener.accept), bool(poll.poll(0)), flush=True)
for fd in filled: os.close(fd)
listener.setblocking(True)
print(sorted(listener.accept()[0].recv(1) for i in range(3)), flush=True)
"""

CLIENT = f"""
import socket
sockets = [socket.create_connection(("node1", {PORT})) for i in range(3)]
for i, each in enumerate(sockets): each.sendall(str(i).encode())
print("sent", flush=True)
for each in sockets: assert each.recv(1) == b""
"""


def test_a_program_at_its_limit_loses_no_connection(two_nodes: Cluster) -> None:
    """EMFILE for each new descriptor; what waits in the queue stays there."""
    pipe = subprocess.PIPE
    server = two_nodes.node(1).popen([sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    client = two_nodes.node(0).popen([sys.executable, "-c", CLIENT], stdout=pipe, text=True)
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "sent\n"
        out, _ = server.communicate("go\n", timeout=TIMEOUT_S)
        assert out.splitlines() == ["EMFILE EMFILE EMFILE", "EMFILE True", "[b'0', b'1', b'2']"]
        assert client.wait(TIMEOUT_S) == 0
    finally:
        for process in (server, client):
            process.kill()
            process.communicate()


ATTACH = "import socket; socket.create_server(('', 0)); print('attached')"
TALK = f"""
import socket, sys
listener = socket.create_server(("", {PORT + 1}))
one = socket.create_connection(("node0", {PORT + 1}))
other = listener.accept()[0]
for line in sys.stdin:
    one.sendall(line.encode())
    print(other.recv(100).decode(), end="", flush=True)
"""


def lowest_free(pid: int) -> int:
    """The descriptor that a process would get next."""
    held = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    return next(number for number in range(len(held) + 1) if number not in held)


def until(condition: Callable[[], Any], cluster: Cluster) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.005)


@pytest.mark.parametrize("who", ["daemon_pid", "nic_pid"])
def test_no_descriptors_for_another_program(two_nodes: Cluster, who: str) -> None:
    """Whoever attaches is refused with EMFILE at once; who was attached goes on; with room all is well."""
    pipe = subprocess.PIPE
    node = two_nodes.node(0)
    honest = node.popen([sys.executable, "-c", TALK], stdin=pipe, stdout=pipe, text=True)
    pid = two_nodes.status()["nodes"][0][who]
    assert pid is not None
    limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    try:
        assert honest.stdin is not None
        assert honest.stdout is not None
        honest.stdin.write("before\n")
        honest.stdin.flush()
        assert honest.stdout.readline() == "before\n"
        free = lowest_free(pid)
        for more in range(4):  # the next descriptor is too many, and so is the one after, …
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (free + more, limit[1]))
            refused = node.run([sys.executable, "-c", ATTACH], timeout=TIMEOUT_S)
            assert refused.returncode == 1, (more, refused, two_nodes.logs())
            assert "Too many open files" in refused.stderr.splitlines()[0], refused.stderr
            assert "[Errno 24]" in refused.stderr.splitlines()[-1], refused.stderr
            honest.stdin.write(f"{more}\n")
            honest.stdin.flush()
            assert honest.stdout.readline() == f"{more}\n"
            if who == "nic_pid" and more == 2:
                break  # it needs three
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
        honest.kill()
        honest.communicate()
    assert node.run([sys.executable, "-c", ATTACH], timeout=TIMEOUT_S).stdout == "attached\n"


RECEIVE = f"""
import errno, socket
listener = socket.create_server(("", {PORT + 2}))
print("ready", flush=True)
try: print(listener.accept()[0].recv(10), flush=True)
except OSError as error: print(errno.errorcode[error.errno], flush=True)
"""
SEND = f"""
import errno, socket, sys
connection = socket.create_connection(("node0", {PORT + 2}))
print("connected", flush=True)
sys.stdin.readline()
connection.send(b"x")
try: print(connection.recv(10), flush=True)
except OSError as error: print(errno.errorcode[error.errno], flush=True)
"""


def test_a_sender_whose_memory_the_receiving_nic_cannot_map(two_nodes: Cluster) -> None:
    """Both ends are told: the sender, too, that would wait for an answer."""
    pipe = subprocess.PIPE
    receiver = two_nodes.node(0).popen([sys.executable, "-c", RECEIVE], stdout=pipe, text=True)
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == "ready\n"
    sender = two_nodes.node(1).popen([sys.executable, "-c", SEND], stdin=pipe, stdout=pipe, text=True)
    nic = two_nodes.status()["nodes"][0]["nic_pid"]
    assert nic is not None
    limit = resource.prlimit(nic, resource.RLIMIT_NOFILE)
    try:
        assert sender.stdout is not None
        assert sender.stdout.readline() == "connected\n"
        resource.prlimit(nic, resource.RLIMIT_NOFILE, (lowest_free(nic), limit[1]))
        assert sender.communicate("go\n", timeout=TIMEOUT_S)[0] == "ECONNRESET\n"
        assert receiver.communicate(timeout=TIMEOUT_S)[0] == "ECONNRESET\n"
    finally:
        resource.prlimit(nic, resource.RLIMIT_NOFILE, limit)
        for process in (receiver, sender):
            process.kill()
            process.communicate()


CONNECT = f"""
import socket, sys
socket.create_connection(("node1", {PORT + 3}))
print("connected", flush=True)
"""


def test_a_first_word_from_a_node_when_there_is_no_descriptor(vmmc_cluster: Callable[..., Cluster]) -> None:
    """The link is made once there is room, and the connect that asked for it goes on."""
    cluster = vmmc_cluster(nodes=2)
    listen = f"import socket, sys; s = socket.create_server(('', {PORT + 3}))"
    listen += "; print(flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    server = cluster.node(1).popen([sys.executable, "-c", listen], stdin=pipe, stdout=pipe, text=True)
    client = None
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "\n"
        nic = cluster.status()["nodes"][1]["nic_pid"]
        assert nic is not None
        limit = resource.prlimit(nic, resource.RLIMIT_NOFILE)
        resource.prlimit(nic, resource.RLIMIT_NOFILE, (lowest_free(nic), limit[1]))
        client = cluster.node(0).popen([sys.executable, "-c", CONNECT], stdout=pipe, text=True)
        until(lambda: "no link to node0: Too many open files" in cluster.node(1).logs(), cluster)
        resource.prlimit(nic, resource.RLIMIT_NOFILE, limit)
        assert client.communicate(timeout=TIMEOUT_S)[0] == "connected\n"
    finally:
        for process in (server, client):
            if process:
                process.kill()
                process.communicate()


# Asleep for good, but for what the NIC does: in poll beside a kernel descriptor.
SLEEP = f"""
import errno, os, select, socket, sys, threading
listener = socket.create_server(("", {PORT + 4}))
one = socket.create_connection(("node0", {PORT + 4}))
other = listener.accept()[0]
print("ready", flush=True)
sys.stdin.readline()
pipe, _ = os.pipe()
poll = select.poll()
poll.register(other, select.POLLIN)
poll.register(pipe, select.POLLIN)
def listen():
    if sys.stdin.readline(): one.sendall(b"x")
threading.Thread(target=listen, daemon=True).start()
print([number for number, _ in poll.poll()] == [other.fileno()])
def code(call):
    try: return call()
    except OSError as error: return errno.errorcode[error.errno]
print(code(lambda: other.recv(1)), code(lambda: socket.create_server(("", 0))) == "ENETDOWN", flush=True)
"""


@pytest.mark.parametrize("who", ["daemon_pid", "nic_pid"])
def test_no_descriptor_to_wake_a_thread_by(two_nodes: Cluster, who: str) -> None:
    """It would sleep for ever: its program is detached, and told so; the next one is well."""
    pipe = subprocess.PIPE
    node = two_nodes.node(0)
    sleeper = node.popen([sys.executable, "-c", SLEEP], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    pid = two_nodes.status()["nodes"][0][who]
    assert pid is not None
    limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    try:
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == "ready\n"
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free(pid), limit[1]))
        assert sleeper.stdin is not None
        sleeper.stdin.write("go\n")
        sleeper.stdin.flush()
        assert sleeper.stdout.readline() == "True\n"
        assert sleeper.stdout.readline() == "ECONNRESET True\n"
        _, errors = sleeper.communicate("", timeout=TIMEOUT_S)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
        sleeper.kill()
        sleeper.communicate()
    assert len(errors.splitlines()) == 1, errors
    assert "no descriptor is left for one of its sleeping threads" in errors
    assert node.run([sys.executable, "-c", ATTACH], timeout=TIMEOUT_S).stdout == "attached\n"


def test_a_waker_that_a_supervisor_had_no_room_for(two_nodes: Cluster) -> None:
    """The next daemon has none to give; the NIC has it, and the thread is woken."""
    pipe = subprocess.PIPE
    node = two_nodes.node(0)
    sleeper = node.popen([sys.executable, "-c", SLEEP], stdin=pipe, stdout=pipe, text=True)
    supervisor = two_nodes.status()["supervisor_pid"]
    assert supervisor is not None
    limit = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
    try:
        assert sleeper.stdin is not None
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == "ready\n"
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (lowest_free(supervisor), limit[1]))
        sleeper.stdin.write("go\n")
        sleeper.stdin.flush()
        until(lambda: "no descriptor is left for a program's waker" in two_nodes.logs(), two_nodes)
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, limit)
        daemon = two_nodes.status()["nodes"][0]["daemon_pid"]
        assert daemon is not None
        os.kill(daemon, signal.SIGKILL)
        until(lambda: "takes over from one that died: NIC" in node.logs(), two_nodes)
        out, _ = sleeper.communicate("send\n", timeout=TIMEOUT_S)
        assert out == "True\nb'x' False\n"
    finally:
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, limit)
        sleeper.kill()
        sleeper.communicate()
