"""The demos: what this is for, shown on a running cluster in a few seconds each.

A demo starts its own cluster, runs ordinary programs on it, says what happens and checks every claim
that it makes: a claim that does not hold ends it with `DemoFailed`.

    cluster.py      eight nodes, real programs talking across them
    redirection.py  where a transfer's bytes are copied, and what posting the receive early saves
    fork.py         what a fork does to open sockets, on purpose
    exec.py         the same for exec
    stage.py        how demos speak: headings, tables, bars, claims
    programs/       the small programs that run on the nodes; they know nothing of VMMC
"""

from __future__ import annotations

from vmmc_emu.demo.stage import DemoFailed, Stage

__all__ = ["DEMOS", "DemoFailed", "Stage", "run"]

DEMOS = {
    "cluster": "eight nodes, and programs from your machine talking across them",
    "redirection": "the same transfer with the receive posted before, in the middle, after, and never",
    "fork": "why a forking server fails in its child, and what works instead",
    "exec": "what exec does to open sockets, and starting programs that disturbs nothing",
}
"""Name and one line of what it shows."""


def run(name: str, stage: Stage) -> None:
    """Runs the demo of that name; raises `DemoFailed` when something is not as it claims."""
    # Imported when chosen: listing the demos loads none of them.
    if name == "cluster":
        from vmmc_emu.demo.cluster import show  # noqa: PLC0415
    elif name == "redirection":
        from vmmc_emu.demo.redirection import show  # noqa: PLC0415
    elif name == "fork":
        from vmmc_emu.demo.fork import show  # noqa: PLC0415
    elif name == "exec":
        from vmmc_emu.demo.exec import show  # noqa: PLC0415
    else:
        raise ValueError(f"there is no demo {name!r}: it is one of {', '.join(DEMOS)}")
    show(stage)
