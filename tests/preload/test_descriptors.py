"""Descriptors of VMMC sockets behave as descriptors; what VMMC cannot do is refused with a reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmmc_emu import Cluster

PAIR = """
import array, ctypes, errno, fcntl, os, select, socket, stat, subprocess, sys
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
server, _ = listener.accept()
libc = ctypes.CDLL(None, use_errno=True)
"""


def run(cluster: Cluster, code: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code on node 0 of the cluster, with a connected pair `client`, `server` at hand."""
    return cluster.node(0).run(
        [*prefix, sys.executable, "-c", PAIR + code], capture_output=True, text=True, timeout=60, check=False
    )


def check(cluster: Cluster, code: str) -> None:
    done = run(cluster, code)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_descriptor_like_any_other(two_nodes: Cluster) -> None:
    check(
        two_nodes,
        """
assert stat.S_ISSOCK(os.fstat(client.fileno()).st_mode)
copy = os.dup(client.fileno())
client.setblocking(False)
assert fcntl.fcntl(copy, fcntl.F_GETFL) & os.O_NONBLOCK  # shared, as by every duplicate
assert not fcntl.fcntl(server, fcntl.F_GETFL) & os.O_NONBLOCK
client.close()
os.write(copy, b"still open")
assert server.recv(100) == b"still open"
os.dup2(os.open("/dev/null", os.O_RDONLY), copy)
assert os.read(copy, 1) == b"" and server.recv(100) == b""
number = server.fileno()
os.closerange(number, number + 1)
try:
    server.recv(1)
except OSError as error:
    assert error.errno == errno.EBADF
else:
    raise AssertionError
os.closerange(3, 65536)  # the library's own descriptors survive that
again = socket.create_server(("127.0.0.1", 0))
other = socket.create_connection(again.getsockname())
""",
    )


def test_streams_of_the_c_library(two_nodes: Cluster) -> None:
    check(
        two_nodes,
        """
libc.fdopen.restype = ctypes.c_void_p
stream = ctypes.c_void_p(libc.fdopen(client.fileno(), b"r+"))
assert libc.fileno(stream) == client.fileno()
libc.fprintf(stream, b"number %d", 42)
libc.fflush(stream)
assert server.recv(100) == b"number 42"
libc.dprintf(client.fileno(), b"and %s", b"text")
assert server.recv(100) == b"and text"
server.sendall(b"a line\\n")
line = ctypes.create_string_buffer(100)
libc.fgets(line, 100, stream)
assert line.value == b"a line\\n"
libc.fclose(stream)
assert server.recv(1) == b""
client.detach()
""",
    )


def test_a_socket_cannot_be_passed_on(two_nodes: Cluster) -> None:
    done = run(
        two_nodes,
        """
a, b = socket.socketpair()
try:
    a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [client.fileno()]))])
except OSError as error:
    assert error.errno == errno.EOPNOTSUPP
a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
assert b.recvmsg(1, 100)[0] == b"x"
""",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "cannot be passed to another process" in done.stderr


def test_children_stay_on_the_node(two_nodes: Cluster) -> None:
    done = run(two_nodes, "print(subprocess.check_output([sys.executable, '-c', 'import socket; "
                          "print(socket.gethostname())'], env={}, text=True), end='')")  # fmt: skip
    assert done.stdout == "node0\n", done.stderr


def test_exec_closes_what_is_inherited(two_nodes: Cluster) -> None:
    done = run(
        two_nodes,
        """
os.set_inheritable(client.fileno(), True)
code = f"import os\\ntry: os.fstat({client.fileno()})\\nexcept OSError as e: print(e.errno)"
subprocess.run([sys.executable, "-c", code], close_fds=False, check=True)
client.sendall(b"untouched")
assert server.recv(100) == b"untouched"
""",
    )
    assert (done.stdout, done.stderr) == ("9\n", "")


def test_only_the_nodes_interfaces(two_nodes: Cluster) -> None:
    code = """
import fcntl, psutil, socket, struct
print({n: [a.address for a in l] for n, l in psutil.net_if_addrs().items()})
print(socket.if_nameindex(), socket.if_nametoindex("vmmc0"), socket.if_indextoname(1))
for unknown in (lambda: socket.if_nametoindex("eth0"), lambda: socket.if_indextoname(3)):
    try:
        print(unknown())
    except OSError:
        pass
def ask(sock, request, name):  # the struct ifreq's union
    return fcntl.ioctl(sock, request, struct.pack("40s", name))[16:]
SIOCGIFCONF, SIOCGIFADDR, SIOCGIFINDEX = 0x8912, 0x8915, 0x8933
import array
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    with socket.socket(socket.AF_INET, kind) as sock:
        room = array.array("B", bytes(200))
        got = fcntl.ioctl(sock, SIOCGIFCONF, struct.pack("iP", 200, room.buffer_info()[0]))
        length = struct.unpack("iP", got)[0]
        rows = [room.tobytes()[at : at + 40] for at in range(0, length, 40)]
        print([(row[:16].rstrip(b"\\0").decode(), socket.inet_ntoa(row[20:24])) for row in rows])
        print(socket.inet_ntoa(ask(sock, SIOCGIFADDR, b"vmmc0")[4:8]), ask(sock, SIOCGIFINDEX, b"lo")[0])
        try:
            ask(sock, SIOCGIFADDR, b"eth0")
        except OSError as error:
            print(error.strerror)
"""
    done = two_nodes.node(1).run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    asked = ["[('lo', '127.0.0.1'), ('vmmc0', '198.18.0.2')]", "198.18.0.2 1", "No such device"]
    assert done.stdout.splitlines() == [
        "{'lo': ['127.0.0.1', '::1'], 'vmmc0': ['198.18.0.2', 'fd00:766d:6d63::2']}",
        "[(1, 'lo'), (2, 'vmmc0')] 2 lo",
        *asked,
        *asked,
    ]


def test_the_first_thread_has_ended(two_nodes: Cluster, program: Callable[..., str]) -> None:
    """/proc/self is that thread's: neither the placeholders' name nor what close_range leaves goes by it."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with two_nodes.node(0).popen([program("leader_gone")], **pipes) as process:
        assert process.stdout
        said = [process.stdout.readline() for _ in range(7)]
        names = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
        process.communicate("\n", timeout=30)
    calls = ("bind 0", "listen 0", "connect 0", "close_range 0", "send 1", "recv 1", "ready")
    assert said == [f"{each}\n" for each in calls]
    own = [name for name in names if f"vmmc-placeholder.{process.pid}." in name]
    assert [name[0] for name in own] == ["/"], names
