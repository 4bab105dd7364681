"""Nodes as objects: programs, functions and connections from a test process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from vmmc_emu import Cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(nodes=3) as cluster:
        yield cluster


# ---- run and popen ----


def test_run_captures_text(cluster: Cluster) -> None:
    done = cluster.node(1).run([sys.executable, "-c", "import socket; print(socket.gethostname())"])
    assert (done.stdout, done.stderr, done.returncode) == ("node1\n", "", 0)


def test_run_options(cluster: Cluster) -> None:
    node = cluster.node(0)
    assert node.run("cat; exit 3", shell=True, input="x").returncode == 3
    assert node.run(["cat"], input=b"\xff", stdout=subprocess.PIPE).stdout == b"\xff"
    assert node.run(["sh", "-c", "echo $A"], env={"A": "b"}).stdout == "b\n"
    with pytest.raises(subprocess.CalledProcessError):
        node.run(["false"], check=True)
    with pytest.raises(FileNotFoundError):
        node.run(["no-such-program"])
    with pytest.raises(subprocess.TimeoutExpired) as expired:
        node.run(["sh", "-c", "echo before; exec sleep 60"], timeout=0.5)
    assert str(expired.value.stdout) == "before\n"
    assert [p for p in cluster.programs() if "sleep" in p["command"]] == []


def test_popen_is_seen_and_counted_to_its_node(cluster: Cluster) -> None:
    with cluster.node(2).popen(["sleep", "600"]) as process:
        (found,) = [p for p in cluster.programs() if p["pid"] == process.pid]
        assert (found["node"], found["command"]) == ("node2", "sleep 600")
        assert cluster.node(2).programs() == [found]
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert cluster.node(2).programs() == []


# ---- functions ----


@dataclass
class Point:
    x: int


def shifted(point: Point, by: int = 1) -> tuple[Point, str]:
    return Point(point.x + by), socket.gethostname()


class CustomError(Exception):
    pass


def test_function(cluster: Cluster) -> None:
    assert cluster.node(1).python(shifted, Point(4), by=3) == (Point(7), "node1")


def test_lambda_and_closure(cluster: Cluster) -> None:
    number = 20
    assert cluster.node(0).python(lambda x: x + number, 22) == 42


def test_function_of_the_standard_library(cluster: Cluster) -> None:
    assert cluster.node(2).python(socket.gethostname) == "node2"


def test_large_results(cluster: Cluster) -> None:
    assert cluster.node(0).python(bytes, 50_000_000) == bytes(50_000_000)


def test_exception_comes_back(cluster: Cluster) -> None:
    def fails() -> None:
        raise CustomError("on purpose")

    with pytest.raises(CustomError, match="on purpose") as caught:
        cluster.node(1).python(fails)
    assert "on node1:\nTraceback" in caught.value.__notes__[0]
    assert "in fails" in caught.value.__notes__[0]
    with pytest.raises(SystemExit):
        cluster.node(1).python(sys.exit, 3)


def test_result_that_cannot_travel(cluster: Cluster) -> None:
    with pytest.raises(TypeError, match="the result of the function, lock, cannot be sent back"):
        cluster.node(0).python(threading.Lock)


def test_process_that_dies(cluster: Cluster) -> None:
    with pytest.raises(ChildProcessError, match="on node2 was ended by signal 9"):
        cluster.node(2).python(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ChildProcessError, match="ended with status 5"):
        cluster.node(2).python(os._exit, 5)


def test_function_that_leaves_a_child_behind(cluster: Cluster) -> None:
    def leaves() -> int:
        return subprocess.Popen(["sleep", "600"]).pid

    pid = cluster.node(0).python(leaves)
    os.kill(pid, signal.SIGKILL)


def test_functions_that_talk(cluster: Cluster) -> None:
    def serve() -> bytes:
        with socket.create_server(("", 5005)) as listener:
            connection, _ = listener.accept()
            with connection:
                return connection.recv(100)

    def say() -> str:
        with socket.create_connection(("node0", 5005)) as connection:
            connection.sendall(b"from " + socket.gethostname().encode())
            return str(connection.getpeername()[0])

    call = cluster.node(0).submit(serve)
    cluster.node(0).wait_for_port(5005)
    assert cluster.node(1).python(say) == "198.18.0.1"
    assert call.result(timeout=20) == b"from node1"
    assert call.result() == b"from node1"


def test_result_timeout_and_kill(cluster: Cluster) -> None:
    call = cluster.node(0).submit(time.sleep, 600)
    with pytest.raises(TimeoutError, match="still runs after"):
        call.result(timeout=0.2)
    call.kill()
    with pytest.raises(ChildProcessError):
        call.result()


# ---- connections from outside ----


@pytest.fixture
def echo(cluster: Cluster) -> Iterator[int]:
    def serve() -> None:
        listener = socket.create_server(("", 6006))

        def one(connection: socket.socket) -> None:
            with connection:
                while data := connection.recv(65536):
                    connection.sendall(data)
                connection.sendall(b"end")

        while True:
            threading.Thread(target=one, args=(listener.accept()[0],)).start()

    call = cluster.node(1).submit(serve)
    cluster.node(1).wait_for_port(6006)
    yield 6006
    call.kill()


def test_connect(cluster: Cluster, echo: int) -> None:
    before = cluster.node(1).counters()["connections_opened"]
    with cluster.node(1).connect(echo) as connection:
        data = os.urandom(3_000_000)

        def send() -> None:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        received = bytearray()
        while chunk := connection.recv(1 << 20):
            received += chunk
        sender.join()
    assert bytes(received) == data + b"end"
    assert cluster.node(1).counters()["connections_opened"] > before


def test_connect_from_many_threads(cluster: Cluster, echo: int) -> None:
    results: list[bytes] = []

    def one(i: int) -> None:
        with cluster.node(1).connect(echo) as connection:
            connection.sendall(b"%03d" % i)
            results.append(connection.recv(10))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [b"%03d" % i for i in range(30)]


def test_connect_where_nobody_listens(cluster: Cluster) -> None:
    with pytest.raises(ConnectionRefusedError, match="node2 port 9"):
        cluster.node(2).connect(9)


def test_connect_again_after_its_relay_was_killed(cluster: Cluster, echo: int) -> None:
    cluster.node(1).connect(echo).close()
    (relay,) = [p["pid"] for p in cluster.node(1).programs() if "relay" in p["command"]]
    os.kill(relay, signal.SIGKILL)
    with cluster.node(1).connect(echo) as connection:
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"


def test_connect_to_a_program_that_listens_on_ipv6_only(cluster: Cluster) -> None:
    def serve() -> None:
        with socket.create_server(("::", 6007), family=socket.AF_INET6) as listener:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"six")

    call = cluster.node(0).submit(serve)
    cluster.node(0).wait_for_port(6007)
    with cluster.node(0).connect(6007) as connection:
        assert connection.recv(10) == b"six"
    call.result(timeout=20)


def test_wait_for_port_that_nobody_opens(cluster: Cluster) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no program listens on port 4444 of node2"):
        cluster.node(2).wait_for_port(4444, timeout=0.3)
    assert 0.3 <= time.monotonic() - began < 5


# ---- looking ----


def test_sockets(cluster: Cluster, echo: int) -> None:
    with cluster.node(1).connect(echo) as connection:
        connection.sendall(b"x")
        connection.recv(1)
        found = cluster.node(1).sockets()
        (listening,) = [s for s in found if s.state == "LISTEN"]
        assert (listening.node, listening.port, listening.peer) == ("node1", echo, "*:*")
        established = [s for s in found if s.state == "ESTAB" and s.port == echo]
        assert len(established) == 1
        assert established[0].peer.startswith("198.18.0.2:")


def test_counters(cluster: Cluster) -> None:
    assert set(cluster.counters()) == {"node0", "node1", "node2"}
    assert cluster.counters()["node0"].keys() == cluster.node(0).counters().keys()


def test_logs(cluster: Cluster) -> None:
    assert "node0 daemon | " in cluster.logs()
    assert "node1 daemon | " not in cluster.node(0).logs()
