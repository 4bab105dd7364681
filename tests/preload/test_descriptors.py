"""Descriptors of VMMC sockets behave as descriptors; what VMMC cannot do is refused with a reason."""

from __future__ import annotations

import subprocess
import sys

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
    code = "import psutil; print({n: [a.address for a in l] for n, l in psutil.net_if_addrs().items()})"
    done = two_nodes.node(1).run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == ("{'lo': ['127.0.0.1', '::1'], 'vmmc0': ['198.18.0.2', 'fd00:766d:6d63::2']}\n")
