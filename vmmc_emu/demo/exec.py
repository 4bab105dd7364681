"""`demo exec`: what exec does to open sockets, and starting programs that disturbs nothing."""

from __future__ import annotations

import contextlib
import secrets

from vmmc_emu.cluster import Cluster
from vmmc_emu.demo.fork import DIAGNOSTICS, PORT, program, start
from vmmc_emu.demo.stage import Stage

WAYS = ("subprocess", "subprocess with preexec_fn", "posix_spawn", "system", "popen")


def show(stage: Stage) -> None:
    """A program that execs itself with a connection open, and one that starts others beside its own."""
    stage.say(
        "VMMC communicates through memory, and exec gives the process a new one: no socket is left after it."
    )
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster(nodes=2, name=f"demo-{secrets.token_hex(4)}"))
        start(cluster, 0, program("echo_threads", PORT), stack)

        stage.heading("1. A program that execs itself, its connection marked to be inherited")
        stage.command(1, ["python3", "exec_itself.py", "node0", str(PORT)])
        before = cluster.counters()["node1"]["exec_closed_sockets"]
        done = cluster.node(1).run(
            program("exec_itself", "node0", PORT),
            capture_output=True, text=True, timeout=15, check=False, env=DIAGNOSTICS,
        )  # fmt: skip
        stage.quote(done.stdout + done.stderr)
        stage.claim("is a socket" in done.stdout, "before exec there was a connection")
        stage.claim(
            "EBADF" in done.stdout.partition("after exec")[2],
            "after it the descriptor is closed, although the program asked to keep it",
        )
        stage.claim(
            "exec" in done.stderr, "the library explained it, once, on the program's stderr", done.stderr
        )
        counted = cluster.counters()["node1"]["exec_closed_sockets"] - before
        stage.claim(counted >= 1, f"and counted it: {counted} socket closed by an exec", str(counted))

        stage.heading("2. A program that starts others while its connection is open")
        stage.command(1, ["python3", "starts_programs.py", "node0", str(PORT)])
        done = cluster.node(1).run(
            program("starts_programs", "node0", PORT), capture_output=True, text=True, timeout=15, check=False
        )
        stage.quote(done.stdout + done.stderr)
        for way in WAYS:
            stage.claim(
                f"{way}: the connection works" in done.stdout, f"{way}: the connection goes on as before"
            )
    stage.end()
