"""The machine's memory runs out: a control group of little memory stands for the machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Cli = Any  # conftest.Cli

MEBIBYTE = 1 << 20


class Group:
    """A control group with a limit of memory, by either version of the kernel's interface."""

    def __init__(self, directory: Path, mebibytes: int) -> None:
        self._directory = directory
        bytes_most = mebibytes * MEBIBYTE
        for name, value in (
            ("memory.max", bytes_most), ("memory.swap.max", 0),
            ("memory.limit_in_bytes", bytes_most), ("memory.memsw.limit_in_bytes", bytes_most),
        ):  # fmt: skip
            if (directory / name).exists():
                (directory / name).write_text(str(value))

    def enter(self) -> None:
        """For a child process, before it becomes its program."""
        (self._directory / "cgroup.procs").write_text(str(os.getpid()))

    def killed(self) -> int:
        """How many processes the kernel has ended for want of memory."""
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(FileNotFoundError):
                lines = (self._directory / name).read_text().splitlines()
                return sum(int(line.split()[1]) for line in lines if line.split()[0] == "oom_kill")
        raise AssertionError(self._directory)


def _directory() -> Path | None:
    """A new control group in which memory can be limited, or None."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mounts = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")]
        elif "memory" in controllers.split(","):
            mounts = [Path("/sys/fs/cgroup/memory")]
        else:
            continue
        for parent in [mount / path.lstrip("/") for mount in mounts] + mounts:
            made = parent / f"vmmc-test-{secrets.token_hex(4)}"
            with contextlib.suppress(OSError):
                made.mkdir()
                if (made / "memory.max").exists() or (made / "memory.limit_in_bytes").exists():
                    return made
                made.rmdir()
    return None


@pytest.fixture
def group() -> Iterator[Callable[[int], Group]]:
    """Makes one control group, of so many MiB.  To be named before `cli`, whose cluster has to go first."""
    directory = _directory()
    if directory is None:
        pytest.skip("no control group for memory can be made here (as root, mostly, one can)")
    yield lambda mebibytes: Group(directory, mebibytes)
    directory.rmdir()


def within(cli: Cli, group: Group, *arguments: object) -> subprocess.Popen[str]:
    return cli.popen(*arguments, preexec_fn=group.enter)  # type: ignore[no-any-return]


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_a_program_that_eats_all(group: Callable[[int], Group], cli: Cli) -> None:
    """It is killed; its peer reads what it had sent, and then end of file or a reset; the others go on."""
    small = group(200)
    code, errors = finish(within(cli, small, "up", "--nodes", 2))
    assert code == 0, errors
    serve = (
        "import socket\n"
        "listener = socket.create_server(('', 7000))\n"
        "print('ready', flush=True)\n"
        "connection, _ = listener.accept()\n"
        "got = b''\n"
        "try:\n"
        "    while data := connection.recv(65536): got += data\n"
        "    how = 'end of file'\n"
        "except ConnectionResetError: how = 'reset'\n"
        "print(len(got), how, flush=True)\n"
    )
    eat = (
        "import socket\n"
        "connection = socket.create_connection(('node0', 7000))\n"
        "connection.sendall(bytes(100_000))\n"
        "eaten = []\n"
        "while True: eaten.append(bytearray(b'x') * (1 << 20))\n"
    )
    server = within(cli, small, "run", "--node", 0, "--", sys.executable, "-c", serve)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    code, errors = finish(within(cli, small, "run", "--node", 1, "--", sys.executable, "-c", eat))
    assert code == 128 + signal.SIGKILL, errors
    assert small.killed() == 1
    count, _, how = server.communicate(timeout=60)[0].strip().partition(" ")
    assert count == "100000"
    assert how in {"end of file", "reset"}
    cli.ok("run", "--node", 1, "--", "true")


def test_nothing_is_left_of_a_cluster_that_had_no_memory(
    group: Callable[[int], Group], cli: Cli, segments: Callable[[str], list[str]]
) -> None:
    """A file in memory, which no kill gives back, takes all there is: nearly every process is killed."""
    small = group(100)
    code, errors = finish(within(cli, small, "up", "--nodes", 3))
    assert code == 0, errors
    pause = "import signal; signal.pause()"
    server = within(cli, small, "run", "--node", 0, "--", sys.executable, "-c", pause)
    memory = os.memfd_create("all there is")
    try:
        fill = f"exec dd if=/dev/zero of=/proc/{os.getpid()}/fd/{memory} bs=1M count=1000"
        done = subprocess.run(
            ["sh", "-c", fill], preexec_fn=small.enter, capture_output=True, check=False, timeout=60
        )
        assert done.returncode == -signal.SIGKILL
        assert small.killed() > 1
        cli.ok("status")
    finally:
        os.close(memory)
    cli.ok("down")
    server.communicate(timeout=60)
    assert segments(cli.cluster) == []
    cli.ok("up", "--nodes", 3)
    cli.ok("run", "--all", "--", "true")
