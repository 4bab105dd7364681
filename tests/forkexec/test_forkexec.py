"""Fork and exec: what they close, and what they leave alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vmmc_emu
from vmmc_emu import Cluster

# Over VMMC alone, on purpose: this is the limitation that a user-level network has.
LIMITED = (
    "fork_closes_in_child", "closing_in_child_succeeds", "close_range_in_child", "listening_socket",
    "child_opens_its_own", "number_used_again_in_child", "epoll_and_select_in_child", "raw_clone",
    "fork_while_a_thread_receives", "parent_dies_first",
)  # fmt: skip
# As over the kernel.
UNDISTURBED = ("vfork_and_exec", "vfork_and_dup2", "spawn", "system_and_popen", "fork_and_exec", "exec_fails")
EXEC = ("exec_leaves_nothing",)

DEMO_PROGRAMS = Path(vmmc_emu.__file__).parent / "demo" / "programs"
DIAGNOSTICS = {"VMMC_DIAGNOSTICS": "1"}


def test_every_case_is_listed(program: Callable[..., str]) -> None:
    listed = subprocess.run([program("forkexec")], capture_output=True, text=True, check=True)
    assert tuple(listed.stdout.split()) == LIMITED + UNDISTURBED + EXEC


@pytest.mark.parametrize("case", UNDISTURBED)
def test_kernel(case: str, program: Callable[..., str], echo_server: Callable[..., int]) -> None:
    """What the program expects of starting programs is what Linux does."""
    command = [program("forkexec"), case, "127.0.0.1", str(echo_server())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.native
@pytest.mark.parametrize("case", LIMITED + UNDISTURBED + EXEC)
def test_c_program(
    case: str, two_nodes: Cluster, program: Callable[..., str], echo_server: Callable[..., int]
) -> None:
    command = [program("forkexec"), case, "node1", str(echo_server(two_nodes, 1))]
    done = two_nodes.node(0).run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _demo(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(DEMO_PROGRAMS / f"{name}.py"), *map(str, arguments)]


class Server:
    """A program on a node that says "listening", until it is ended."""

    def __init__(self, cluster: Cluster, node: int, command: list[str]) -> None:
        self.process = cluster.node(node).popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=DIAGNOSTICS
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "listening\n"

    def ended(self) -> tuple[str, str]:
        self.process.terminate()
        out, err = self.process.communicate(timeout=10)
        return out, err


def _client(cluster: Cluster, port: int, text: str = "hello") -> subprocess.CompletedProcess[str]:
    command = _demo("echo_client", "node0", port, text)
    return cluster.node(1).run(command, capture_output=True, text=True, timeout=20, check=False)


def test_forking_server(two_nodes: Cluster) -> None:
    before = two_nodes.counters()["node0"]["fork_closed_sockets"]
    server = Server(two_nodes, 0, _demo("echo_fork", 7000))
    clients = [_client(two_nodes, 7000) for _ in range(2)]
    out, err = server.ended()
    for client in clients:
        assert (client.returncode, client.stdout, client.stderr) == (
            3,
            "the server ended the connection\n",
            "",
        )
    assert out == "child: EBADF: Bad file descriptor\n" * 2
    assert two_nodes.counters()["node0"]["fork_closed_sockets"] > before
    assert len([line for line in err.splitlines() if "fork" in line]) >= 1, err


CLIENT_THAT_SPEAKS_FIRST = """
import socket
with socket.create_connection(("node0", 7001), timeout=10) as s:
    s.sendall(b"hello\\n")
    print(s.recv(100))
"""


def test_client_of_a_forking_server_that_speaks_first(two_nodes: Cluster) -> None:
    """What it sent was never read; the end is a clean one all the same: a fork is no failure."""
    server = Server(two_nodes, 0, _demo("echo_fork", 7001))
    for _ in range(5):
        client = two_nodes.node(1).run(
            [sys.executable, "-c", CLIENT_THAT_SPEAKS_FIRST],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert (client.stdout, client.stderr) == ("b''\n", "")
    server.ended()


def test_threaded_server(two_nodes: Cluster) -> None:
    server = Server(two_nodes, 0, _demo("echo_threads", 7002))
    assert _client(two_nodes, 7002).stdout == "hello\n"
    assert server.ended() == ("", "")


def test_child_that_opens_its_own_socket(two_nodes: Cluster) -> None:
    server = Server(two_nodes, 0, _demo("echo_threads", 7003))
    done = two_nodes.node(1).run(
        _demo("child_connects", "node0", 7003), capture_output=True, text=True, timeout=20, check=False
    )
    assert done.stdout.splitlines() == [
        "child, parent's socket: EBADF",
        "child, own socket: from the child",
        "parent, own socket: from the parent",
    ], done.stderr
    server.ended()


def test_daemonises_before_it_opens_its_socket(two_nodes: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    two_nodes.node(0).run(
        _demo("daemonise", "before", 7004, log),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        timeout=20, check=True,
    )  # fmt: skip
    two_nodes.node(0).wait_for_port(7004)
    assert _client(two_nodes, 7004).stdout == "hello\n"


def test_daemonises_after_it_opened_its_socket(two_nodes: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    # The daemon holds the pipe open, so this waits for its end too.
    done = two_nodes.node(0).run(
        _demo("daemonise", "after", 7005, log),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=True, env=DIAGNOSTICS,
    )  # fmt: skip
    assert log.read_text() == "accept: EBADF\n"
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "fork" in done.stderr


def test_exec_leaves_nothing_open(two_nodes: Cluster) -> None:
    server = Server(two_nodes, 0, _demo("echo_threads", 7006))
    before = two_nodes.counters()["node1"]["exec_closed_sockets"]
    done = two_nodes.node(1).run(
        _demo("exec_itself", "node0", 7006),
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
        env=DIAGNOSTICS,
    )
    assert "EBADF" in done.stdout.splitlines()[1]
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "exec" in done.stderr
    assert two_nodes.counters()["node1"]["exec_closed_sockets"] == before + 1
    server.ended()


def test_starting_programs_disturbs_nothing(two_nodes: Cluster) -> None:
    server = Server(two_nodes, 0, _demo("echo_threads", 7007))
    done = two_nodes.node(1).run(
        _demo("starts_programs", "node0", 7007), capture_output=True, text=True, timeout=20, check=False
    )
    ways = ["subprocess", "subprocess with preexec_fn", "posix_spawn", "system", "popen"]
    assert done.stdout.splitlines() == [f"{way}: the connection works" for way in ways], done.stderr
    server.ended()


def test_diagnostics_are_off_unless_asked_for(two_nodes: Cluster) -> None:
    server = Server(two_nodes, 0, _demo("echo_threads", 7008))
    done = two_nodes.node(1).run(
        _demo("exec_itself", "node0", 7008), capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stderr == ""
    server.ended()
