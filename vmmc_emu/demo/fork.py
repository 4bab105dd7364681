"""`demo fork`: what a fork does to open sockets, on purpose, and what works instead."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from vmmc_emu.cluster import Cluster
from vmmc_emu.demo.stage import Stage

PROGRAMS = Path(__file__).parent / "programs"
PORT = 7000
DIAGNOSTICS = {"VMMC_DIAGNOSTICS": "1"}  # the library explains itself on stderr


def program(name: str, *arguments: object) -> list[str]:
    """The command that runs one of the demos' programs."""
    return [sys.executable, str(PROGRAMS / f"{name}.py"), *map(str, arguments)]


def start(
    cluster: Cluster, node: int, command: list[str], stack: contextlib.ExitStack
) -> subprocess.Popen[str]:
    """Starts a server that says "listening", and waits until it does; `stack` ends it."""
    process = cluster.node(node).popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=DIAGNOSTICS
    )
    stack.callback(end, process)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Ends a program; what it had said on stdout and stderr."""
    if process.poll() is None:
        process.terminate()
    if process.stdout is None or process.stdout.closed:
        return "", ""
    return process.communicate()


def show(stage: Stage) -> None:
    """The forking server, the threaded one, the child with a socket of its own, and daemons."""
    stage.say("A user-level network lives in a process's memory. Two processes cannot both own one socket")
    stage.say("without asking the kernel at every step, so a fork leaves the sockets with the parent.")
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmmc-demo-")))
        cluster = stack.enter_context(Cluster(nodes=2, name=f"demo-{secrets.token_hex(4)}"))
        _forking_server(stage, cluster, stack)
        _threaded_server(stage, cluster, stack)
        _child_with_its_own(stage, cluster)
        _daemons(stage, cluster, directory)
    stage.end()


def _client(cluster: Cluster, text: str, port: int = PORT) -> subprocess.CompletedProcess[str]:
    command = program("echo_client", "node0", port, text)
    return cluster.node(1).run(command, capture_output=True, text=True, timeout=15, check=False)


def _forking_server(stage: Stage, cluster: Cluster, stack: contextlib.ExitStack) -> None:
    stage.heading("1. A server that forks for each connection")
    stage.command(0, ["python3", "echo_fork.py", str(PORT)])
    before = cluster.counters()["node0"]["fork_closed_sockets"]
    server = start(cluster, 0, program("echo_fork", PORT), stack)
    stage.command(1, ["python3", "echo_client.py", "node0", str(PORT), "hello"])
    client = _client(cluster, "hello")
    stage.quote(client.stdout + client.stderr)
    said, explained = end(server)
    stage.say("  the server said:")
    stage.quote(said + explained)
    stage.claim("child: EBADF" in said, "in the child the accepted socket is closed: EBADF")
    stage.claim(
        client.returncode == 3 and "ended the connection" in client.stdout,
        "the client saw a clean end: the parent closed its copy, which was the only one",
        client.stderr,
    )
    stage.claim("fork" in explained, "the library explained it, once, on the program's stderr", explained)
    counted = cluster.counters()["node0"]["fork_closed_sockets"] - before
    stage.claim(
        counted >= 2,
        f"and counted it: {counted} sockets closed by a fork (the listening one too)",
        str(counted),
    )


def _threaded_server(stage: Stage, cluster: Cluster, stack: contextlib.ExitStack) -> None:
    stage.heading("2. The same server with a thread for each connection")
    stage.command(0, ["python3", "echo_threads.py", str(PORT)])
    start(cluster, 0, program("echo_threads", PORT), stack)
    stage.command(1, ["python3", "echo_client.py", "node0", str(PORT), "hello"])
    client = _client(cluster, "hello")
    stage.quote(client.stdout + client.stderr)
    stage.claim(
        client.stdout.strip() == "hello", "threads share the memory, and so the sockets: the echo comes back"
    )


def _child_with_its_own(stage: Stage, cluster: Cluster) -> None:
    stage.heading("3. A child that opens a socket of its own")
    stage.command(1, ["python3", "child_connects.py", "node0", str(PORT)])
    done = cluster.node(1).run(
        program("child_connects", "node0", PORT), capture_output=True, text=True, timeout=15, check=False
    )
    stage.quote(done.stdout + done.stderr)
    lines = done.stdout.splitlines()
    stage.claim("child, parent's socket: EBADF" in lines, "the parent's socket is closed to the child")
    stage.claim(
        "child, own socket: from the child" in lines, "its own works: the child got an endpoint of its own"
    )
    stage.claim(
        "parent, own socket: from the parent" in lines,
        "the parent's connection went on, although the child closed its copy",
    )


def _daemons(stage: Stage, cluster: Cluster, directory: Path) -> None:
    stage.heading("4. Servers that go into the background")
    log = directory / "log"

    def daemonise(order: str, port: int) -> list[str]:
        stage.command(0, ["python3", "daemonise.py", order, str(port)])
        return program("daemonise", order, port, log)

    quiet = subprocess.DEVNULL  # a pipe would be held open as long as the daemon lives
    cluster.node(0).run(
        daemonise("before", PORT + 1), stdin=quiet, stdout=quiet, stderr=quiet, timeout=15, check=True
    )
    cluster.node(0).wait_for_port(PORT + 1)
    client = _client(cluster, "hello", PORT + 1)
    stage.quote(client.stdout + client.stderr)
    stage.claim(client.stdout.strip() == "hello", "one that forks before it opens its socket works")

    # Here it is the way to wait for the daemon's end.
    done = cluster.node(0).run(
        daemonise("after", PORT + 2), stdin=quiet, capture_output=True, text=True, timeout=15, check=False,
        env=DIAGNOSTICS,
    )  # fmt: skip
    said = log.read_text()
    stage.quote(said + done.stderr)
    stage.claim("EBADF" in said, "one that forks after it opened its socket does not", said)
    stage.claim("fork" in done.stderr, "and the library says why", done.stderr)
