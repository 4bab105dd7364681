"""Daemons and the supervisor: attaching, cleaning up after programs, coming back after a death."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from vmmc_emu import Cluster

Segments = Callable[[str], list[str]]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(nodes=2) as cluster:
        yield cluster


def until(condition: Callable[[], Any], what: object = "") -> Any:
    """Waits until something is so."""
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline, what() if callable(what) else what
    return found


def endpoints(cluster: Cluster, segments: Segments, node: int) -> set[str]:
    """Serials of the endpoints that have segments on a node."""
    marker = f".{cluster.node(node).name}.ep"
    return {name.split(marker)[1].split(".")[0] for name in segments(cluster.name) if marker in name}


CONNECT = """
import socket, time
connection = socket.create_connection(("node0", 9100))
print("connected", flush=True)
time.sleep(600)
"""
LISTEN = "import socket; l = socket.create_server(('', 9100)); print('ready', flush=True)"


def test_a_program_without_stream_sockets_does_not_attach(cluster: Cluster, segments: Segments) -> None:
    code = (
        "import socket; socket.socket(socket.AF_UNIX); socket.socket(type=socket.SOCK_DGRAM); print('done')"
    )
    assert cluster.node(0).run([sys.executable, "-c", code]).stdout == "done\n"
    assert "attached" not in cluster.node(0).logs()


@pytest.mark.parametrize(
    "end",
    [
        "pass",
        "import os; os._exit(0)",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.execvp('sleep', ['sleep', '600'])",
    ],
)
def test_everything_is_freed_when_a_program_ends_or_calls_exec(
    cluster: Cluster, segments: Segments, end: str
) -> None:
    before = segments(cluster.name)
    code = f"{LISTEN}; input(); {end}"
    with cluster.node(0).popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdin is not None
        assert program.stdout.readline() == "ready\n"
        assert len(endpoints(cluster, segments, 0)) == 1
        program.stdin.write("\n")
        program.stdin.flush()
        until(lambda: not endpoints(cluster, segments, 0), cluster.logs)
        assert segments(cluster.name) == before
        assert [s for s in cluster.node(0).sockets() if s.state == "LISTEN"] == []
        program.kill()
    # The port is free again.
    again = cluster.node(0).run([sys.executable, "-c", LISTEN])
    assert (again.stdout, again.stderr) == ("ready\n", "")


def test_a_child_that_stays_does_not_keep_the_endpoint(cluster: Cluster, segments: Segments) -> None:
    code = (
        f"{LISTEN}\n"
        "import os\n"
        "child = os.fork() or os.execvp('sleep', ['sleep', '600'])\n"
        "print(child, flush=True)"
    )
    with cluster.node(0).popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        child = int(program.stdout.readline())
        until(lambda: not endpoints(cluster, segments, 0), cluster.logs)
        os.kill(child, signal.SIGKILL)


def test_what_was_sent_before_the_end_is_delivered(cluster: Cluster) -> None:
    def receive() -> int:
        with socket.create_server(("", 9101)) as listener:
            connection, _ = listener.accept()
            total = 0
            while chunk := connection.recv(65536):
                total += len(chunk)
            return total

    receiver = cluster.node(1).submit(receive)
    cluster.node(1).wait_for_port(9101)
    code = (
        "import os, socket\n"
        "c = socket.create_connection(('node1', 9101))\n"
        "c.sendall(bytes(3_000_000))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert cluster.node(0).run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert receiver.result(timeout=30) == 3_000_000


def test_indices_are_used_again_and_serials_are_not(cluster: Cluster) -> None:
    for _ in range(3):
        assert cluster.node(0).run([sys.executable, "-c", LISTEN]).stdout == "ready\n"

    def ends() -> list[str]:
        return [line for line in cluster.node(0).logs().splitlines() if "endpoint 0, " in line]

    until(lambda: len([line for line in ends() if "serial" not in line]) == 3, cluster.logs)
    log = cluster.node(0).logs()
    attached = [
        line.split("as endpoint ")[1].split(":")[0] for line in log.splitlines() if "attached" in line
    ]
    assert attached == ["0, serial 1", "0, serial 2", "0, serial 3"]


def test_nonsense_on_the_socket_harms_nobody(cluster: Cluster) -> None:
    path = str(cluster.place.socket(0))
    magic = 0x636D6D76
    for message in (b"x", bytes(16), struct.pack("4I", magic, 1, 99, 0), struct.pack("4I", magic, 1, 2, 0)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(path)
            connection.send(message)
            assert connection.recv(100) == b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:  # of a future version
        connection.connect(path)
        connection.send(struct.pack("4I", magic, 999, 1, 0))
        assert struct.unpack_from("Ii", connection.recv(100)) == (magic, errno.EPROTO)
    assert cluster.node(0).run([sys.executable, "-c", LISTEN]).stdout == "ready\n"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_gets_nowhere(
    cluster: Cluster, segments: Segments, said_by_another_user: Callable[..., str]
) -> None:
    path = str(cluster.place.socket(0))
    names = [f"/dev/shm/{name}" for name in segments(cluster.name)]
    code = (
        "import socket, sys\n"
        "for path in sys.argv[2:]:\n"
        "    try: open(path, 'rb'); print('opened', path)\n"
        "    except PermissionError: pass\n"
        "try: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect(sys.argv[1]); print('connected')\n"
        "except PermissionError: print('refused')\n"
    )
    assert said_by_another_user(code, path, *names) == "refused\n"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_reaches_no_program(
    cluster: Cluster, said_by_another_user: Callable[..., str]
) -> None:
    """Its placeholders are a Unix socket that listens, and the kernel tells everybody its name."""
    with cluster.node(0).popen(
        [sys.executable, "-c", f"{LISTEN.rstrip()}\nprint(input())"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as program:  # fmt: skip
        assert program.stdout and program.stdout.readline() == "ready\n"
        lines = Path("/proc/net/unix").read_text().splitlines()[1:]
        ours = f"vmmc-placeholder.{program.pid}."
        names = [columns[-1] for line in lines if ours in (columns := line.split())[-1]]
        assert names, lines
        assert not [name for name in names if name.startswith("@")], "an abstract one has no directory"
        assert not list(cluster.place.runtime.glob("vmmc-placeholder*"))
        names += [str(cluster.place.runtime / name.rpartition("/")[2]) for name in names]
        code = (
            "import socket, sys\n"
            "for name in sys.argv[1:]:\n"
            "    with socket.socket(socket.AF_UNIX) as s:\n"
            "        try: s.connect(name); print('connected to', name)\n"
            "        except OSError: pass\n"
            "print('done')\n"
        )
        assert said_by_another_user(code, *names) == "done\n"
        program.communicate("bye\n")


def test_a_nic_that_is_killed_comes_back(cluster: Cluster) -> None:
    before = cluster.status()["nodes"]
    os.kill(before[0]["nic_pid"], signal.SIGKILL)
    until(
        lambda: (
            (now := cluster.status()["nodes"])[0]["nic_pid"] not in (None, before[0]["nic_pid"])
            and now[0]["state"] == "up"
        )
    )
    until(lambda: f"NIC {cluster.status()['nodes'][0]['nic_pid']} is ready" in cluster.logs(), cluster.logs)
    now = cluster.status()["nodes"]
    assert (now[0]["daemon_pid"], now[1]) == (before[0]["daemon_pid"], before[1])
    assert f"NIC {before[0]['nic_pid']} was ended by SIGKILL" in cluster.logs()
    assert cluster.node(0).run([sys.executable, "-c", LISTEN]).stdout == "ready\n"


@pytest.mark.parametrize(("what", "first"), [("nic", "0.1"), ("daemon", "0.05")])
def test_who_is_killed_again_and_again_is_replaced_at_once_but_not_in_a_storm(
    cluster: Cluster, what: str, first: str
) -> None:
    killed: set[int] = set()

    def kill_the_next() -> None:
        pid = until(lambda: (now := cluster.status()["nodes"][0][f"{what}_pid"]) not in killed and now)
        killed.add(pid)
        os.kill(pid, signal.SIGKILL)
        name = "NIC" if what == "nic" else what
        until(lambda: f"{name} {pid} was ended by SIGKILL" in cluster.logs(), cluster.logs)

    for _ in range(10):
        kill_the_next()
    assert "a successor starts in" not in cluster.logs()
    while f"a successor starts in {first} s" not in cluster.logs():
        assert len(killed) < 100
        kill_the_next()
    assert until(lambda: cluster.status()["nodes"][0]["state"] == "up")


def test_a_nic_that_crashes_again_and_again_is_not_restarted_in_a_storm(cluster: Cluster) -> None:
    killed: set[int] = set()
    while "a successor starts in 0.1 s" not in cluster.logs():
        assert len(killed) < 20
        pid = until(lambda: (now := cluster.status()["nodes"][0]["nic_pid"]) not in killed and now)
        killed.add(pid)
        until(lambda: f"NIC {pid} is ready" in cluster.logs(), cluster.logs)
        os.kill(pid, signal.SIGSEGV)
        until(lambda: f"NIC {pid} was ended by SIGSEGV" in cluster.logs(), cluster.logs)
    assert until(lambda: cluster.status()["nodes"][0]["state"] == "up")


def test_a_daemon_that_is_killed_has_a_successor(cluster: Cluster, segments: Segments) -> None:
    """Connections go on meanwhile; what was attached is still freed, and new programs attach."""

    def echo() -> None:
        with socket.create_server(("", 9102)) as listener:
            connection, _ = listener.accept()
            while data := connection.recv(65536):
                connection.sendall(data)

    server = cluster.node(0).submit(echo)
    cluster.node(0).wait_for_port(9102)
    code = (
        "import socket, sys\n"
        "c = socket.create_connection(('node0', 9102))\n"
        "for line in sys.stdin:\n"
        "    c.sendall(line.encode()); print(c.recv(100).decode(), end='', flush=True)\n"
    )
    client = cluster.node(1).popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert client.stdin is not None
    assert client.stdout is not None

    def exchange(text: str) -> None:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(text)
        client.stdin.flush()
        assert client.stdout.readline() == text

    exchange("before\n")
    before = cluster.status()["nodes"]
    for node in before:
        os.kill(node["daemon_pid"], signal.SIGKILL)
    exchange("meanwhile\n")
    until(lambda: cluster.logs().count("daemon takes over") == 2, cluster.logs)
    exchange("after\n")
    now = cluster.status()["nodes"]
    assert [node["nic_pid"] for node in now] == [node["nic_pid"] for node in before]
    assert not {node["daemon_pid"] for node in now} & {node["daemon_pid"] for node in before}
    assert {node["state"] for node in now} == {"up"}
    other = cluster.node(0).run([sys.executable, "-c", LISTEN])
    assert (other.stdout, other.stderr) == ("ready\n", "")
    client.communicate(timeout=20)
    server.result(timeout=20)
    until(lambda: not endpoints(cluster, segments, 0) | endpoints(cluster, segments, 1), cluster.logs)
    assert "serial 2" in cluster.node(0).logs()


def test_daemon_and_nic_killed_together_come_back(cluster: Cluster) -> None:
    node = cluster.status()["nodes"][0]
    os.kill(node["daemon_pid"], signal.SIGSTOP)
    os.kill(node["nic_pid"], signal.SIGKILL)
    os.kill(node["daemon_pid"], signal.SIGKILL)
    until(
        lambda: (
            (now := cluster.status()["nodes"][0])["state"] == "up"
            and now["nic_pid"] != node["nic_pid"]
            and now["daemon_pid"] != node["daemon_pid"]
        )
    )
    assert cluster.node(0).run([sys.executable, "-c", LISTEN]).stdout == "ready\n"


def test_memory_of_a_node() -> None:
    """Under 12 MB of private memory a node: daemon and NIC."""
    with Cluster(nodes=16) as cluster:
        for node in cluster.status()["nodes"]:
            private = 0
            for pid in (node["daemon_pid"], node["nic_pid"]):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Private_"):
                        private += int(line.split()[1]) * 1024
            assert private < 12_000_000


def test_an_idle_cluster_uses_no_cpu(cluster: Cluster) -> None:
    """With a listening program and an idle connection on it."""
    status = cluster.status()
    found = [psutil.Process(n[key]) for n in status["nodes"] for key in ("daemon_pid", "nic_pid")]
    found.append(psutil.Process(status["supervisor_pid"]))
    with cluster.node(0).popen(
        [sys.executable, "-c", LISTEN + "; import time; c = l.accept(); time.sleep(600)"],
        stdout=subprocess.PIPE, text=True,
    ) as server, cluster.node(1).popen(
        [sys.executable, "-c", CONNECT],
        stdout=subprocess.PIPE, text=True,
    ) as client:  # fmt: skip
        for program in (server, client):
            assert program.stdout is not None
            program.stdout.readline()
            found.append(psutil.Process(program.pid))

        def switches() -> list[tuple[float, int]]:
            return [(sum(p.cpu_times()[:2]), p.num_ctx_switches().voluntary) for p in found]

        # What it does while it comes to rest ends soon; nothing may wake after that.
        def at_rest() -> bool:
            before = switches()
            time.sleep(2)  # what is measured is a time
            return switches() == before

        until(at_rest, "somebody is awake")
        server.kill()
        client.kill()


def test_programs_of_a_node_are_ended_by_pid_not_by_name(cluster: Cluster) -> None:
    """A process outside that looks like a program of the cluster is left alone."""
    bystander = subprocess.Popen(["sleep", "600"], env={**os.environ, "VMMC_CLUSTER": cluster.name})
    program = cluster.node(0).popen(["sleep", "600"])
    cluster.stop()
    assert program.wait(10) == -signal.SIGTERM
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_record_files_are_json(cluster: Cluster) -> None:
    kinds = {json.loads(path.read_text())["kind"] for path in cluster.place.processes.iterdir()}
    assert kinds == {"supervisor", "daemon", "nic"}
