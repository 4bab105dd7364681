"""The command line as users call it, and clusters that end with their test."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmmc_emu import Cluster

# -P: the installed package, also when the tests are started in the source tree.
COMMAND = [sys.executable, "-P", "-m", "vmmc_emu.cli"]

Done = subprocess.CompletedProcess[str]


class Cli:
    """`vmmc-emu --cluster NAME …` for one cluster."""

    def __init__(self, cluster: str) -> None:
        self.cluster = cluster

    def command(self, *arguments: object) -> list[str]:
        return [*COMMAND, "--cluster", self.cluster, *map(str, arguments)]

    def __call__(
        self, *arguments: object, env: dict[str, str] | None = None, input: str | None = None,
        timeout: float = 60, cwd: str | Path | None = None, prefix: tuple[str, ...] = (),
    ) -> Done:  # fmt: skip
        return subprocess.run(
            [*prefix, *self.command(*arguments)], env={**os.environ, **(env or {})}, input=input,
            stdin=None if input is not None else subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout, check=False, cwd=cwd,
        )  # fmt: skip

    def ok(self, *arguments: object, **options: object) -> str:
        done = self(*arguments, **options)  # type: ignore[arg-type]
        assert done.returncode == 0, done.stderr
        return done.stdout

    def popen(self, *arguments: object, **options: object) -> subprocess.Popen[str]:
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            self.command(*arguments),
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
        )


@pytest.fixture
def cli() -> Iterator[Cli]:
    """The command line for a cluster that is not up; it is taken down after the test."""
    found = Cli(f"cli-{secrets.token_hex(4)}")
    yield found
    found.ok("down")


@pytest.fixture
def another() -> Iterator[Callable[..., Cli]]:
    """Makes the command line for further clusters: of that name, or of a new one; they too are taken down."""
    made: list[Cli] = []

    def make(name: str | None = None) -> Cli:
        made.append(Cli(name or f"cli-{secrets.token_hex(4)}"))
        return made[-1]

    yield make
    for each in made:
        each.ok("down")


@pytest.fixture(scope="module")
def up() -> Iterator[Cli]:
    """The command line for a cluster of four nodes that a module's tests share."""
    found = Cli(f"cli-{secrets.token_hex(4)}")
    found.ok("up", "--nodes", 4)
    yield found
    found.ok("down")


@pytest.fixture(scope="module")
def running(up: Cli) -> Cluster:
    """The same cluster as an object."""
    return Cluster.running(up.cluster)


@pytest.fixture
def segments() -> Callable[[str], list[str]]:
    """The names in /dev/shm of a cluster's segments."""

    def found(cluster: str) -> list[str]:
        prefix = f"vmmc.{os.getuid()}.{cluster}."
        return sorted(name for name in os.listdir("/dev/shm") if name.startswith(prefix))

    return found


@pytest.fixture(scope="session")
def said_by_another_user() -> Callable[..., str]:
    """Runs Python code, with arguments, as another user and returns what it prints."""

    def said(code: str, *arguments: str) -> str:
        done = subprocess.run(
            ["/usr/bin/env", "python3", "-c", code, *arguments], user=65534, group=65534, extra_groups=[],
            capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"no Python that another user can run: {done.stderr.splitlines()[-1:]}")
        return done.stdout

    return said
