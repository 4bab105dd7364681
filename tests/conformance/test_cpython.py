"""CPython's own tests of sockets, unmodified, on a node: what passes over the kernel passes over VMMC.

    tox run -e conformance
    VMMC_TEST_PYTHON=/usr/bin/python3.13 tox run -e conformance      another Python, with its `test` package

A node's own 127.0.0.1 is served by its NIC, so these tests use no other path.  What differs on purpose is
listed in differences.txt; only what passes over the kernel, here and now, is asked of the node.
"""

from __future__ import annotations

import functools
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmmc_emu import Cluster

HERE = Path(__file__).parent
OUTCOMES = HERE / "outcomes.py"
MODULES = (
    "test.test_socket",
    "test.test_select",
    "test.test_poll",
    "test.test_epoll",
    "test.test_selectors",
    "test.test_socketserver",
    "test.test_asyncio.test_sock_lowlevel",
    "test.test_asyncio.test_streams",
    "test.test_asyncio.test_server",
    "test.test_asyncio.test_events",
    "test.test_asyncio.test_selector_events",
)
# Not about TCP, and hangs over the kernel of a virtual machine whose host does not answer.
LEFT_OUT = {"test.test_socket.ThreadedVSOCKSocketStreamTest"}
TIMEOUT_S = 90


@functools.cache
def tested_python() -> str | None:
    """The Python whose tests are run: this one, unless told otherwise; None where it came without them."""
    python = os.environ.get("VMMC_TEST_PYTHON", sys.executable)
    has_tests = subprocess.run([python, "-c", "import test.test_socket"], capture_output=True, check=False)
    return python if has_tests.returncode == 0 else None


@functools.cache
def classes() -> tuple[str, ...]:
    """The classes of the modules that have tests."""
    python = tested_python()
    if python is None:
        return ()
    command = [python, str(OUTCOMES), "--list", "/dev/stdout", *MODULES]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return tuple(name for name in listed if name not in LEFT_OUT)


def differences() -> dict[str, str]:
    """The list: a test's name and the reason why it does not pass on a node."""
    lines = (HERE / "differences.txt").read_text().splitlines()
    entries = (line.split(None, 1) for line in lines if line and not line.startswith("#"))
    return {name: reason for name, reason in entries}


def outcomes(file: Path) -> dict[str, str]:
    """What became of each test; "started" of one that hung or took the interpreter with it."""
    return dict(line.split("\t") for line in file.read_text().splitlines())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(nodes=1, name=f"test-{secrets.token_hex(6)}") as cluster:
        yield cluster


def run_class(name: str, directory: Path, cluster: Cluster | None) -> tuple[dict[str, str], str]:
    """Runs a class's tests, on a node or over the kernel: their outcomes and their output."""
    python = tested_python()
    assert python is not None
    directory.mkdir()
    file = directory / "outcomes"
    # The bound is a program's, so that what hangs says where: faulthandler writes every thread's stack.
    bound = ["timeout", "--signal=ABRT", "--kill-after=5", str(TIMEOUT_S)]
    command = [*bound, python, "-X", "faulthandler", str(OUTCOMES), str(file), name]
    run = cluster.node(0).run if cluster else subprocess.run
    done = run(command, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
               stderr=subprocess.STDOUT, text=True, errors="replace", check=False)  # fmt: skip
    return outcomes(file) if file.exists() else {}, done.stdout


@pytest.mark.timeout(3 * TIMEOUT_S)
@pytest.mark.parametrize("name", classes())
def test_as_over_the_kernel(name: str, cluster: Cluster, tmp_path: Path) -> None:
    kernel, _ = run_class(name, tmp_path / "kernel", None)
    node, output = run_class(name, tmp_path / "node", cluster)
    passing = {test for test, outcome in kernel.items() if outcome == "ok"}
    fails = {test for test in passing if node.get(test) != "ok"}
    listed = {test for test in differences() if test.rpartition(".")[0] == name}
    print(output)
    assert {test: node.get(test) for test in fails - listed} == {}, "passes over the kernel, not on a node"
    assert (listed & passing) - fails == set(), "passes on a node: take it off differences.txt"
    assert listed <= set(kernel), "differences.txt names tests that this Python does not have"


@pytest.mark.skipif(not classes(), reason="this Python came without its tests: set VMMC_TEST_PYTHON")
def test_list_names_classes_that_are_run() -> None:
    assert {test.rpartition(".")[0] for test in differences()} <= set(classes())


@pytest.mark.skipif(not classes(), reason="this Python came without its tests: set VMMC_TEST_PYTHON")
def test_bytes_go_through_the_nic(cluster: Cluster, tmp_path: Path) -> None:
    before = cluster.node(0).counters()
    sent, _ = run_class("test.test_socket.SendfileUsingSendTest", tmp_path / "node", cluster)
    after = cluster.node(0).counters()
    transfers = [test for test, outcome in sent.items() if outcome == "ok"]
    assert len(transfers) > 5
    # Each has a connection of its own, and its whole file is 10 MiB: most are sent, some in part.
    assert after["connections_opened"] - before["connections_opened"] >= len(transfers)
    assert after["bytes_received"] - before["bytes_received"] >= 10 * 1024 * 1024
