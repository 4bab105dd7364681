"""What stays the kernel's, and the ways between the host and a node."""

from __future__ import annotations

import contextlib
import errno
import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from vmmc_emu import Cluster


@pytest.fixture
def outside() -> Iterator[tuple[str, int]]:
    """An ordinary server of this machine: its address and port.  Not loopback, which is a node's own."""
    # The address by which this machine would reach others; connecting a datagram socket sends nothing.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = probe.getsockname()[0]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"from outside")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((address, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield address, server.server_port
        finally:
            server.shutdown()
            thread.join()


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


FETCH = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=10).read().decode())"


def test_outside_connection_goes_over_the_kernel(two_nodes: Cluster, outside: tuple[str, int]) -> None:
    before = two_nodes.counters()["node0"]
    done = two_nodes.node(0).run(
        python(FETCH, f"http://{outside[0]}:{outside[1]}/"),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == "from outside\n"
    after = two_nodes.counters()["node0"]
    assert after["bytes_sent"] == before["bytes_sent"]
    assert after["connections_opened"] == before["connections_opened"]


def test_loopback_of_a_node_is_its_own(two_nodes: Cluster, echo_server: Callable[..., int]) -> None:
    """A server of the host on 127.0.0.1 is not a node's."""
    port = echo_server()
    code = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])))"
    done = two_nodes.node(0).run(python(code, port), capture_output=True, text=True, timeout=30, check=False)
    assert "ConnectionRefusedError" in done.stderr


def test_kernel_ports(two_nodes: Cluster, echo_server: Callable[..., int]) -> None:
    """... unless VMMC_KERNEL_PORTS names the port."""
    port = echo_server()
    code = (
        "import socket, sys\n"
        "s = socket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=10)\n"
        "s.sendall(b'hello'); print(s.recv(100))"
    )
    done = two_nodes.node(0).run(
        python(code, port),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env={"VMMC_KERNEL_PORTS": str(port)},
    )
    assert done.stdout == "b'hello'\n"


def test_unix_sockets_and_pairs_pass_through(two_nodes: Cluster, tmp_path: object) -> None:
    code = """
import socket, sys, threading
a, b = socket.socketpair()
a.sendall(b"pair"); print(b.recv(10))
listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1]); listener.listen()
client = socket.socket(socket.AF_UNIX); client.connect(sys.argv[1])
server, _ = listener.accept(); client.sendall(b"unix"); print(server.recv(10))
"""
    done = two_nodes.node(0).run(
        python(code, f"{tmp_path}/socket"), capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "b'pair'\nb'unix'\n"


def test_python_process_outside_reaches_a_node(two_nodes: Cluster, echo_server: Callable[..., int]) -> None:
    port = echo_server(two_nodes, 1)
    with two_nodes.node(1).connect(port) as connection:
        connection.settimeout(10)
        sent = bytes(range(256)) * 400
        sender = threading.Thread(target=connection.sendall, args=(sent,))
        sender.start()
        received = b""
        while len(received) < len(sent):
            received += connection.recv(65536)
        sender.join()
        assert received == sent
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_connect_where_nobody_listens(two_nodes: Cluster) -> None:
    with pytest.raises(ConnectionRefusedError):
        two_nodes.node(1).connect(9)


def test_published_port(two_nodes: Cluster) -> None:
    """`--publish`: an ordinary client on the host reaches a program on a node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host_port = free.getsockname()[1]
    command = [
        sys.executable, "-P", "-m", "vmmc_emu.cli", "--cluster", two_nodes.name, "run", "--node", "1",
        "--publish", f"{host_port}:8080", "--", sys.executable, "-u", "-m", "http.server", "8080",
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        assert "8080" in server.stdout.readline()
        two_nodes.node(1).wait_for_port(8080)
        with contextlib.closing(socket.create_connection(("127.0.0.1", host_port), timeout=10)) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert connection.recv(15) == b"HTTP/1.0 200 OK"
    finally:
        server.terminate()
        server.communicate(timeout=20)


def test_a_program_that_looks_for_its_own_address_finds_its_nodes(
    two_nodes: Cluster, outside: tuple[str, int]
) -> None:
    """By the name of a datagram socket, as many do; what is connected to the outside is the machine's."""
    code = (
        "import socket, sys\n"
        "with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:\n"
        "    probe.connect(('192.0.2.1', 9))\n"
        "    address, port = probe.getsockname()\n"
        "    print(address, port > 0)\n"
        "try:\n"
        "    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:\n"
        "        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)\n"
        "        probe.connect(('::ffff:192.0.2.1', 9))\n"
        "        print(probe.getsockname()[0])\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
        "with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as local:\n"
        "    local.bind(('127.0.0.1', 0))\n"
        "    print(local.getsockname()[0])\n"
        "with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:\n"
        "    bound.bind((sys.argv[1], 0))\n"
        "    print(bound.getsockname()[0])\n"
        "with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:\n"
        "    print(connection.getsockname()[0])\n"
    )
    done = two_nodes.node(1).run(python(code, *outside), timeout=60, check=True)
    own = "198.18.0.2"
    first, second, *others = done.stdout.splitlines()
    assert first == f"{own} True"
    assert second in {f"::ffff:{own}", os.strerror(errno.EAFNOSUPPORT)}  # a kernel without IPv6
    assert others == ["127.0.0.1", outside[0], outside[0]]
