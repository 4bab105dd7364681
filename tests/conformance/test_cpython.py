"""CPython's own tests of sockets, unmodified, on a node: what passes over the kernel passes over VMMC.

    VMMC_TEST_PYTHON=/usr/bin/python3.13 pytest tests/conformance     another Python, with its `test` package
    VMMC_TEST_TRIES=1 pytest tests/conformance                        what fails once has failed

A node's own 127.0.0.1 is served by its NIC, so these tests use no other path: the kernel's TCP opens no
connection meanwhile.  What differs on purpose is listed in differences.txt.  Only what does not pass on the
node is run over the kernel, to see whether it passes there.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import os
import secrets
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from vmmc_emu import Cluster

HERE = Path(__file__).parent
OUTCOMES = HERE / "outcomes.py"
# In how many parts, which run side by side: most of these tests wait for a time to pass.
MODULES = {
    "test.test_poll": 1,
    "test.test_socket": 4,
    "test.test_selectors": 4,
    "test.test_asyncio.test_events": 2,
    "test.test_select": 1,
    "test.test_epoll": 1,
    "test.test_socketserver": 1,
    "test.test_asyncio.test_sock_lowlevel": 1,
    "test.test_asyncio.test_streams": 1,
    "test.test_asyncio.test_server": 1,
    "test.test_asyncio.test_selector_events": 1,
}
# These use pipes, AF_UNIX or what stands for a socket; all others, TCP connections.
WITHOUT_TCP = {
    "test.test_select",
    "test.test_poll",
    "test.test_selectors",
    "test.test_asyncio.test_selector_events",
}
# Not about TCP, and hangs over the kernel of a virtual machine whose host does not answer.
LEFT_OUT = "test.test_socket.ThreadedVSOCKSocketStreamTest"
SIDE_BY_SIDE = 6
TIMEOUT_S = 150
# CPython's tests measure time, and count on prompt answers: on a busy machine they fail over the kernel too.
TRIES = int(os.environ.get("VMMC_TEST_TRIES", "3"))

Runs = dict[str, "list[Future[Run]]"]


@functools.cache
def python_with_tests() -> str | None:
    """The Python whose tests are run: this one if it came with them, or else any of this machine's."""
    chosen = os.environ.get("VMMC_TEST_PYTHON")
    versions = [f"python3.{minor}" for minor in range(11, 16)]
    found = [path for name in ("python3", *versions) for path in [shutil.which(name)] if path]
    homes = sorted(glob.glob(str(Path.home() / ".pyenv/versions/3.1[1-9]*/bin/python3")))
    for python in [chosen] if chosen else [sys.executable, *found, "/usr/bin/python3", *homes]:
        code = "import sys, test.test_socket, test.test_asyncio; assert sys.version_info >= (3, 11)"
        tried = subprocess.run([python, "-c", code], capture_output=True, check=False, cwd="/")
        if tried.returncode == 0:
            return python
    return None


@pytest.fixture(scope="module")
def python() -> str:
    found = python_with_tests()
    if found is None:
        problem = (
            "no Python here came with its tests (`import test.test_socket`): "
            "install libpython3.*-testsuite, or name one that has them in VMMC_TEST_PYTHON"
        )
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    return found


def differences() -> dict[str, str]:
    """The list: a test's name and the reason why it does not pass on a node."""
    lines = (HERE / "differences.txt").read_text().splitlines()
    entries = (line.split(None, 1) for line in lines if line and not line.startswith("#"))
    return {name: reason for name, reason in entries}


@dataclasses.dataclass
class Run:
    """Of one run of some tests: what became of each, what it wrote, and what NIC and kernel did."""

    outcomes: dict[str, str]
    output: str
    kernel_connections: int | None  # None: the run could not have a network of its own
    counters: dict[str, int]

    def not_ok(self) -> set[str]:
        return {test for test, outcome in self.outcomes.items() if outcome != "ok"}


def run(python: str, directory: Path, node: bool, *arguments: str) -> Run:
    """Runs tests, on the only node of a cluster of their own or over the kernel."""
    directory.mkdir(parents=True)
    file = directory / "outcomes"
    # The bound is a program's, so that what hangs says where: faulthandler writes every thread's stack.
    command = ["timeout", "--signal=ABRT", "--kill-after=5", str(TIMEOUT_S), python, "-X", "faulthandler"]
    command += [str(OUTCOMES), str(file), "--without", LEFT_OUT, *arguments]
    counters: dict[str, int] = {}

    def done(command: list[str]) -> str:
        return subprocess.run(
            command, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        ).stdout  # fmt: skip

    if node:
        with Cluster(nodes=1, name=f"test-{secrets.token_hex(6)}") as cluster:
            vmmc_emu = [sys.executable, "-P", "-m", "vmmc_emu.cli", "--cluster", cluster.name]
            output = done([*vmmc_emu, "run", "--node", "0", "--", *command])
            counters = cluster.node(0).counters()
    else:
        output = done(command)
    lines = dict(line.split("\t") for line in file.read_text().splitlines()) if file.exists() else {}
    connections = lines.pop("kernel connections", None)
    return Run(lines, output, None if connections is None else int(connections), counters)


@pytest.fixture(scope="module")
def runs(python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All modules on nodes, begun at once: the parts of each."""
    directory = tmp_path_factory.mktemp("cpython")
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield {
            module: [
                pool.submit(run, python, directory / f"{module}-{i}", True, "--part", f"{i}/{parts}", module)
                for i in range(parts)
            ]
            for module, parts in MODULES.items()
        }


def again(tests: Sequence[str], run_them: Callable[[int, Sequence[str]], Run]) -> set[str]:
    """Runs tests that failed once more, and once more: those that never passed."""
    left = set(tests)
    for attempt in range(1, TRIES):
        if left:
            left = run_them(attempt, sorted(left)).not_ok()
    return left


@pytest.mark.timeout(4 * TIMEOUT_S)
@pytest.mark.parametrize("module", MODULES)
def test_as_over_the_kernel(module: str, runs: Runs, python: str, tmp_path: Path) -> None:
    parts = [each.result() for each in runs[module]]
    node = {test: outcome for part in parts for test, outcome in part.outcomes.items()}
    print("".join(part.output for part in parts))
    assert node, "the tests do not even start on a node"
    fails = {test for part in parts for test in part.not_ok()}
    listed = {test for test in differences() if test.startswith(f"{module}.")}
    passing = set()
    if fails:
        over_kernel = run(python, tmp_path / "kernel", False, *sorted(fails))
        passing = fails - over_kernel.not_ok()
    assert listed <= set(node), "differences.txt names tests that this Python does not have"
    assert listed <= fails, "passes on a node: take it off differences.txt"

    failed = passing - listed
    gone = {test: node[test] for test in failed if node[test] in ("started", "planned")}
    assert gone == {}, "hangs or ends the interpreter, on a node only"
    repeatedly = again(sorted(failed), lambda i, tests: run(python, tmp_path / f"again{i}", True, *tests))
    assert {test: node[test] for test in repeatedly} == {}, "passes over the kernel, not on a node"
    for test in failed:
        warnings.warn(f"{test}: {node[test]} on a node, and passed when tried again", stacklevel=1)


@pytest.mark.timeout(4 * TIMEOUT_S)
@pytest.mark.parametrize("module", [module for module in MODULES if module not in WITHOUT_TCP])
def test_bytes_go_through_the_nic_and_not_around_it(module: str, runs: Runs) -> None:
    parts = [each.result() for each in runs[module]]
    assert sum(part.counters["connections_opened"] for part in parts) > 0
    assert sum(part.counters["bytes_received"] for part in parts) > 0
    # None where this user may not have a network namespace: then the NIC's counters are all there is.
    assert {part.kernel_connections for part in parts} <= {0, None}


def test_the_counters_that_this_relies_on_count(python: str, tmp_path: Path) -> None:
    """The same tests over the kernel are seen by the kernel, and their every byte on a node by the NIC."""
    name = "test.test_socket.SendfileUsingSendTest"
    over_kernel = run(python, tmp_path / "kernel", False, name)
    node = run(python, tmp_path / "node", True, name)
    transfers = len(node.outcomes) - len(node.not_ok())
    assert transfers > 5
    # Each has a connection of its own, and its whole file is 10 MiB: most are sent, some in part.
    assert node.counters["connections_opened"] >= transfers
    assert node.counters["bytes_received"] >= 10 * 1024 * 1024
    if over_kernel.kernel_connections is not None:
        assert over_kernel.kernel_connections > 5
        assert node.kernel_connections == 0


def test_list_names_modules_that_are_run() -> None:
    assert {test.rsplit(".", 2)[0] for test in differences()} <= set(MODULES)
