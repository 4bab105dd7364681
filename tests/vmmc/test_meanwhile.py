"""What one thread ends while another waits for it: the other is told, and does not wait on."""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from vmmc_emu import Cluster, Endpoint

PAGE = 4096
TIMEOUT_S = 20


class Sleeper:
    """A call in a thread of its own, found asleep in it (or before it, where it waits for Python's lock)."""

    def __init__(self, call: Callable[[], object]) -> None:
        """Returns once the kernel says that the thread sleeps, or the call has returned."""
        self._told: queue.Queue[object] = queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()
        stat = Path(f"/proc/self/task/{self._thread.native_id}/stat")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it is over
            while stat.read_text().rpartition(") ")[2][0] != "S":
                self._thread.join(0.001)

    def _run(self, call: Callable[[], object]) -> None:
        try:
            self._told.put(call())
        except OSError as error:
            self._told.put(error.errno)

    def told(self) -> object:
        """What the call returned, or its errno."""
        return self._told.get(timeout=TIMEOUT_S)


def test_a_redirection_that_is_ended(ends: tuple[Endpoint, Endpoint]) -> None:
    export = ends[0].export(ends[0].alloc(PAGE), "buffer")
    redirection = export.redirect(ends[0].alloc(PAGE))
    sleeper = Sleeper(redirection.wait)
    redirection.end()
    assert sleeper.told() == errno.EINVAL


def test_an_export_that_is_ended(ends: tuple[Endpoint, Endpoint]) -> None:
    export = ends[0].export(ends[0].alloc(PAGE), "buffer")
    sleeper = Sleeper(export.notification)
    export.unexport()
    assert sleeper.told() == errno.EINVAL


@pytest.mark.parametrize("ending", ["forgotten", "waited for"])
def test_a_transfer(ending: str, cluster: Cluster, ends: tuple[Endpoint, Endpoint]) -> None:
    """Two threads wait for one transfer, or one forgets it: it ends once, and others go on."""
    ends[0].export(ends[0].alloc(PAGE), "buffer")
    target = ends[1].import_(0, "buffer", timeout_ms=TIMEOUT_S * 1000)
    source = ends[1].alloc(PAGE)
    cluster.link(0, 1).down()
    transfer = target.post_send(source)
    sleepers = [Sleeper(transfer.wait), Sleeper(transfer.wait)]
    if ending == "forgotten":
        transfer.forget()
    cluster.link(0, 1).up()
    told = sorted(str(sleeper.told()) for sleeper in sleepers)
    assert told == ([str(errno.EINVAL)] * 2 if ending == "forgotten" else [str(errno.EINVAL), "None"])
    for _ in range(3):
        target.send(source, timeout_ms=TIMEOUT_S * 1000)
