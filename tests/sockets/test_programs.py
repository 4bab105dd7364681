"""Programs that nobody here wrote, unmodified, talking across nodes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vmmc_emu import Cluster, Node

SIZES = {"empty": 0, "byte": 1, "mebibyte": 1 << 20, "large": 300_000_000}


@contextlib.contextmanager
def serving(node: Node, command: list[str], port: int, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Runs a server on a node until the block ends."""
    with (directory / f"server-{node.name}-{port}.log").open("w+") as log:
        process = node.popen(command, cwd=directory, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            node.wait_for_port(port)
            yield process
        finally:
            process.terminate()
            process.wait(timeout=20)
            log.seek(0)
            print(log.read())  # shown when the test fails


def http_server(port: int) -> list[str]:
    return [sys.executable, "-m", "http.server", str(port)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a file of each size."""
    directory = tmp_path_factory.mktemp("files")
    bytes_of = random.Random(2).randbytes
    for name, size in SIZES.items():
        with (directory / name).open("wb") as file:
            for begin in range(0, size, 1 << 24):
                file.write(bytes_of(min(size - begin, 1 << 24)))
    yield directory
    shutil.rmtree(directory)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture(scope="module")
def http_server_on_node0(eight_nodes: Cluster, files: Path) -> Iterator[None]:
    with serving(eight_nodes.node(0), http_server(8000), 8000, files):
        yield


@pytest.mark.programs("curl")
@pytest.mark.usefixtures("http_server_on_node0")
class TestHttp:
    """python3 -m http.server on one node and curl from the seven others."""

    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[pytest.mark.large] if name == "large" else []) for name in SIZES]
    )
    def test_curl(self, name: str, eight_nodes: Cluster, files: Path) -> None:
        expected = sha256(files / name)
        before = eight_nodes.counters()
        fetch = ["sh", "-c", 'curl -sSf "$0" | sha256sum', f"http://node0:8000/{name}"]
        clients = [
            eight_nodes.node(i).popen(fetch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for i in range(1, 8)
        ]
        for client in clients:
            out, err = client.communicate(timeout=100)
            assert (out.split()[:1], err) == ([expected], "")
        after = eight_nodes.counters()
        for i in range(1, 8):
            node = f"node{i}"
            assert after[node]["bytes_received"] - before[node]["bytes_received"] >= SIZES[name]

    def test_ipv6_and_numbers(self, eight_nodes: Cluster, files: Path) -> None:
        for host in ("198.18.0.1", "node0"):
            got = eight_nodes.node(3).run(
                ["curl", "-sSf", f"http://{host}:8000/byte"], capture_output=True, timeout=30, check=True
            )
            assert got.stdout == (files / "byte").read_bytes()
        command = [sys.executable, "-m", "http.server", "8006", "--bind", "::"]
        with serving(eight_nodes.node(0), command, 8006, files):
            got = eight_nodes.node(3).run(
                ["curl", "-sSf", "http://[fd00:766d:6d63::1]:8006/byte"],
                capture_output=True,
                timeout=30,
                check=True,
            )
            assert got.stdout == (files / "byte").read_bytes()


@pytest.mark.programs("curl")
def test_same_port_on_all_eight_nodes(eight_nodes: Cluster, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        servers = []
        for i in range(8):
            home = tmp_path / f"node{i}"
            home.mkdir()
            (home / "name").write_text(f"this is node{i}")
            servers.append(stack.enter_context(serving(eight_nodes.node(i), http_server(8080), 8080, home)))
        for i in range(8):
            urls = [f"http://node{j}:8080/name" for j in range(8)]
            got = eight_nodes.node(i).run(
                ["curl", "-sSf", *urls], capture_output=True, text=True, timeout=30, check=True
            )
            assert got.stdout == "".join(f"this is node{j}" for j in range(8))
        for server in servers:
            assert psutil.Process(server.pid).net_connections("tcp") == []


@pytest.fixture(scope="module")
def redis_on_node2(eight_nodes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    command = ["redis-server", "--port", "6379", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""]
    with serving(eight_nodes.node(2), command, 6379, tmp_path_factory.mktemp("redis")):
        yield


@pytest.mark.programs("redis-server", "redis-cli")
@pytest.mark.usefixtures("redis_on_node2")
class TestRedis:
    def cli(self, cluster: Cluster, node: int, *words: str, input: str | None = None) -> str:
        command = ["redis-cli", "-h", "node2", *words]
        done = cluster.node(node).run(
            command, input=input, capture_output=True, text=True, timeout=60, check=True
        )
        out: str = done.stdout
        return out

    def test_values_across_nodes(self, eight_nodes: Cluster) -> None:
        for i in range(8):
            assert self.cli(eight_nodes, i, "set", f"key{i}", f"value of node{i}") == "OK\n"
        for i in range(8):
            assert self.cli(eight_nodes, i, "get", f"key{7 - i}") == f"value of node{7 - i}\n"

    def test_large_value(self, eight_nodes: Cluster) -> None:
        value = "0123456789abcdef" * 65536
        assert self.cli(eight_nodes, 5, "-x", "set", "large", input=value) == "OK\n"
        assert self.cli(eight_nodes, 6, "get", "large") == value + "\n"

    def test_a_pipeline_of_commands(self, eight_nodes: Cluster) -> None:
        commands = "".join(f"set pipelined{i} {i}\r\n" for i in range(20000))
        answer = self.cli(eight_nodes, 7, "--pipe", input=commands)
        assert "errors: 0, replies: 20000" in answer


@pytest.mark.programs("iperf3")
@pytest.mark.parametrize("options", [[], ["-R"], ["-P", "4"], ["-P", "4", "-R"]], ids=" ".join)
def test_iperf3(options: list[str], eight_nodes: Cluster, tmp_path: Path) -> None:
    with serving(eight_nodes.node(4), ["iperf3", "-s"], 5201, tmp_path):
        done = eight_nodes.node(1).run(
            ["iperf3", "-c", "node4", "-t", "1", "-J", *options],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        result = json.loads(done.stdout)
        assert done.returncode == 0, result.get("error")
        assert "error" not in result
        end = result["end"]
        assert len(end["streams"]) == (4 if "-P" in options else 1)
        assert end["sum_received"]["bytes"] > 0
        # All that was received had been sent, and all but what was under way at the end arrived.
        assert end["sum_received"]["bytes"] <= end["sum_sent"]["bytes"]


def test_host_names(two_nodes: Cluster) -> None:
    code = "import socket as s; print(s.gethostname(), s.gethostbyname('node1'), s.getfqdn('198.18.0.2'))"
    done = two_nodes.node(0).run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "node0 198.18.0.2 node1\n"


def test_a_program_without_sockets_is_left_alone(two_nodes: Cluster) -> None:
    """It is not even attached: the node has no endpoint for it."""
    done = two_nodes.node(0).run(
        [sys.executable, "-c", "import os; print([n for n in os.listdir('/proc/self/fd')])"],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert not [name for name in os.listdir("/dev/shm") if f".{two_nodes.name}.node0.ep" in name]
