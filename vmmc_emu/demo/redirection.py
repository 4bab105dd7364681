"""`demo redirection`: where a transfer's bytes are copied, and what posting the receive early saves.

The sender does exactly the same each time: it sends a message to the receiver's default buffer, in two
halves.  The receiver wants the message somewhere else.  When it says so, and whether, is all that differs.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from vmmc_emu import vmmc
from vmmc_emu.cluster import Cluster
from vmmc_emu.demo.stage import Stage

HALF = 2 << 20
MESSAGE = 2 * HALF
MESSAGES = 600  # that each timing moves, in all rounds
ROUNDS = 5

Transfer = Callable[[], None]


class Receiver:
    """The two ends of the transfer, and the receiver's four ways to take a message."""

    def __init__(self, receiver: vmmc.Endpoint, sender: vmmc.Endpoint) -> None:
        self.default = receiver.export(receiver.alloc(MESSAGE), "default buffer")
        self.wanted = receiver.alloc(MESSAGE)  # where the receiver wants it
        self.target = sender.import_(receiver.node, "default buffer")
        self.source = sender.alloc(MESSAGE)

    def _send(self, half: int) -> None:
        self.target.send(self.source[half * HALF : (half + 1) * HALF], half * HALF)

    def _copy_rest(self, redirected: vmmc.Redirected) -> None:
        """Copies what did not go straight to where it is wanted: it lies in the default buffer."""
        for start, stop in ((0, redirected.start), (redirected.stop, MESSAGE)):
            self.wanted[start:stop] = self.default.memory[start:stop]

    def before(self) -> None:
        """Posted before the message arrives: nothing is left to copy."""
        with self.default.redirect(self.wanted) as redirection:
            self._send(0)
            self._send(1)
            self._copy_rest(redirection.end())

    def middle(self) -> None:
        """Posted when a half has arrived: that half is copied, the rest goes straight through."""
        self._send(0)
        with self.default.redirect(self.wanted) as redirection:
            self._send(1)
            self._copy_rest(redirection.end())

    def after(self) -> None:
        """Posted when all has arrived: too late, all of it is copied."""
        self._send(0)
        self._send(1)
        with self.default.redirect(self.wanted) as redirection:
            self._copy_rest(redirection.end())

    def never(self) -> None:
        """No redirection: all of it is copied."""
        self._send(0)
        self._send(1)
        self._copy_rest(vmmc.Redirected(0, 0))


def show(stage: Stage) -> None:
    """Counts copies and measures bandwidth for each time of posting; checks every byte."""
    stage.say(
        "A sender always addresses the receiver's default buffer. The receiver may post another address,"
    )
    stage.say(
        "a redirection: its NIC then puts the bytes there at once, and the receiver need not copy them."
    )
    stage.say(f"node1 sends {MESSAGE >> 20} MiB messages to node0, which wants each in a certain place:")
    with (
        Cluster(nodes=2, name=f"demo-{secrets.token_hex(4)}") as cluster,
        vmmc.attach(0, cluster.name) as receiving,
        vmmc.attach(1, cluster.name) as sending,
    ):
        ends = Receiver(receiving, sending)
        cases: list[tuple[str, Transfer, float]] = [
            ("posted before", ends.before, 1.0),
            ("posted in the middle", ends.middle, 0.5),
            ("posted after", ends.after, 0.0),
            ("redirection off", ends.never, 0.0),
        ]
        redirected: dict[str, float] = {}
        for name, transfer, expected in cases:
            redirected[name] = _check(stage, cluster, ends, name, transfer, expected)
        # Interleaved, so that what else the machine does meets all of them.
        timings: dict[str, list[float]] = {name: [] for name, _, _ in cases}
        for _ in range(ROUNDS):
            for name, transfer, _ in cases:
                began = time.perf_counter()
                for _ in range(MESSAGES // ROUNDS):
                    transfer()
                timings[name].append(MESSAGES // ROUNDS * MESSAGE / (time.perf_counter() - began) / 1e9)
        speeds = {name: sorted(each)[ROUNDS // 2] for name, each in timings.items()}
    stage.heading("Copies and bandwidth")
    stage.table(
        ["receive", "copies a byte", "of these by the receiver", "bandwidth"],
        [
            [name, f"{2 - redirected[name]:.2f}", f"{1 - redirected[name]:.2f}", f"{speeds[name]:.2f} GB/s"]
            for name, _, _ in cases
        ],
    )
    stage.say()
    stage.bars("GB/s", list(speeds.items()))
    stage.say()
    gain = speeds["posted before"] / speeds["redirection off"]
    # Copies are counted and hold always, speed is measured and depends on what else the machine does.
    if gain > 1:
        stage.say(f"A receive that was posted before is {gain:.2f} times as fast as one without redirection.")
    else:
        stage.say("The machine is too busy with other things for these speeds to mean much; the copies do.")
    stage.end()


def _check(
    stage: Stage, cluster: Cluster, ends: Receiver, name: str, transfer: Transfer, expected: float
) -> float:
    """Makes one transfer and compares every byte; the share of the bytes that was redirected."""
    content = secrets.token_bytes(MESSAGE)
    ends.source[:] = content
    ends.wanted[:] = bytes(MESSAGE)
    before = cluster.counters()["node0"]
    transfer()
    after = cluster.counters()["node0"]
    stage.claim(
        bytes(ends.wanted) == content, f"{name}: all {MESSAGE} bytes are where the receiver wants them"
    )
    straight = after["bytes_redirected"] - before["bytes_redirected"]
    default = after["bytes_default"] - before["bytes_default"]
    stage.claim(
        (straight, default) == (round(expected * MESSAGE), round((1 - expected) * MESSAGE)),
        f"{name}: the NIC put {straight >> 10} KiB straight there, {default >> 10} KiB in the default buffer",
        f"redirected {straight}, default {default}",
    )
    return straight / MESSAGE
