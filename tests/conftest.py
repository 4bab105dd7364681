"""What all tests share: a place of their own for clusters, nothing left behind, and compiled programs."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from vmmc_emu import Cluster
from vmmc_emu.paths import known_clusters, native_directory

PROGRAMS = Path(__file__).parent / "programs"

pytest_plugins = ["pytester"]


def _processes_of(runtime: Path) -> list[str]:
    """Processes that were started, by whatever way, with this session's runtime directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("VMMC_RUNTIME_DIR") == str(runtime):
                found.append(f"{process.pid} {' '.join(process.cmdline())}")
        except psutil.Error:
            continue  # ended, or somebody else's
    return found


@pytest.fixture(scope="session", autouse=True)
def runtime_directory() -> Iterator[Path]:
    """Gives this session's clusters a runtime directory of their own, and fails when one leaves a trace."""
    # Short, and not pytest's: the path of a Unix socket has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="vmmc-tests-"))
    before = set(_processes_of(directory))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMMC_RUNTIME_DIR", str(directory))
        patch.delenv("VMMC_CLUSTER", raising=False)
        patch.setenv("NO_COLOR", "1")
        yield directory
        left = [f"cluster {paths.cluster}: {paths.segments()}" for paths in known_clusters()]
        left += [f"process {line}" for line in set(_processes_of(directory)) - before if "pytest" not in line]
    if left:
        pytest.fail("the tests left behind:\n" + "\n".join(left))
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Compiles tests/programs/NAME.c, once, and returns the path of the program."""
    directory = tmp_path_factory.mktemp("programs")

    def compiled(name: str, *flags: str) -> str:
        path = directory / "-".join([name, *flags]).replace("/", "_")
        if not path.exists():
            compiler = os.environ.get("CC", "cc")
            sanitizer = os.environ.get("SANITIZE")  # as the native parts are built (tox.ini)
            sanitize = [f"-fsanitize={sanitizer}"] if sanitizer else []
            warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-result"]
            include = f"-I{native_directory() / 'include'}"
            source = PROGRAMS / f"{name}.c"
            subprocess.run(
                [compiler, "-std=gnu11", "-D_GNU_SOURCE", "-O2", "-g", "-pthread", *warnings, *sanitize,
                 include, str(source), "-o", str(path), *flags],
                check=True,
            )  # fmt: skip
        return str(path)

    return compiled


@pytest.fixture(scope="session")
def with_own_mounts() -> list[str]:
    """How a command begins that has mounts of its own; where that is not allowed the test is skipped."""
    beginning = ["unshare", "--mount"] + ([] if os.getuid() == 0 else ["--user", "--map-root-user"])
    if not shutil.which("unshare") or subprocess.run(
        [*beginning, "true"], check=False, capture_output=True
    ).returncode:
        pytest.skip("mount namespaces are not allowed here")
    return beginning


def _packages() -> dict[str, str]:
    """Programs that tests need, each with the package that has it."""
    lines = (Path(__file__).parent / "needed_programs.txt").read_text().splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#"))
    return {program: package for program, package in pairs}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test whose programs are not there is skipped on a developer's machine, and fails in CI."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # where Debian has servers
    needed = {program for mark in item.iter_markers("programs") for program in mark.args}
    missing = sorted(program for program in needed if not shutil.which(program, path=path))
    if missing:
        packages = sorted({_packages().get(program, program) for program in missing})
        problem = f"{', '.join(missing)} not found: install {' '.join(packages)}"
        if os.environ.get("CI"):
            pytest.fail(problem, pytrace=False)
        pytest.skip(problem)


EchoServer = Callable[..., int]


@pytest.fixture
def echo_server(program: Callable[..., str]) -> Iterator[EchoServer]:
    """Starts an echo server on a node of a cluster, or over the kernel without one; returns its port."""
    with contextlib.ExitStack() as stack:

        def start(cluster: Cluster | None = None, node: int = 0) -> int:
            popen = cluster.node(node).popen if cluster else subprocess.Popen
            server = popen([program("echo_server")], stdout=subprocess.PIPE, text=True)

            def end() -> None:
                server.kill()
                server.communicate()

            stack.callback(end)
            assert server.stdout is not None
            word, port = server.stdout.readline().split()
            assert word == "listening"
            return int(port)

        yield start


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """A cluster of two nodes, shared by the tests of a module."""
    with Cluster(nodes=2, name=f"test-{secrets.token_hex(6)}") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def eight_nodes() -> Iterator[Cluster]:
    """A cluster of eight nodes, shared by the tests of a module."""
    with Cluster(nodes=8, name=f"test-{secrets.token_hex(6)}") as cluster:
        yield cluster
