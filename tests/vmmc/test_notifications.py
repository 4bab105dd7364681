"""Notifications: taken by waiting, or by handlers in a thread of the library."""

from __future__ import annotations

import queue
import threading

import pytest

from vmmc_emu import Cluster, Endpoint
from vmmc_emu.vmmc import Export, Import, Notice

PAGE = 4096
TIMEOUT_MS = 20_000
TIMEOUT_S = TIMEOUT_MS / 1000


def connect(ends: tuple[Endpoint, Endpoint], name: str = "buffer") -> tuple[Export, Import]:
    """An export on node 0 and node 1's import of it."""
    export = ends[0].export(ends[0].alloc(PAGE), name)
    return export, ends[1].import_(0, name, timeout_ms=TIMEOUT_MS)


def test_says_what_arrived_and_whose_it_was(ends: tuple[Endpoint, Endpoint]) -> None:
    export, target = connect(ends)
    source = ends[1].alloc(PAGE)
    source[:5] = b"hello"
    target.send(source[:5], 100, notify=True, tag=0xFFFFFFFF, timeout_ms=TIMEOUT_MS)
    assert export.notification(TIMEOUT_MS) == Notice(100, 5, 1, 0xFFFFFFFF, ends[1].serial)
    assert bytes(export.memory[100:105]) == b"hello"


def test_the_data_is_in_place_before_its_notification(ends: tuple[Endpoint, Endpoint]) -> None:
    export = ends[0].export(ends[0].alloc(1 << 20), "large")
    target = ends[1].import_(0, "large", timeout_ms=TIMEOUT_MS)
    source = ends[1].alloc(1 << 20)
    for i in range(1, 30):
        source[:] = bytes([i]) * (1 << 20)
        transfer = target.post_send(source, notify=True)
        assert export.notification(TIMEOUT_MS).length == 1 << 20
        assert export.memory[0] == export.memory[(1 << 20) - 1] == i
        transfer.wait(TIMEOUT_MS)


def test_none_is_given_that_was_not_asked_for(ends: tuple[Endpoint, Endpoint], cluster: Cluster) -> None:
    export, target = connect(ends)
    source = ends[1].alloc(PAGE)
    target.send(source, timeout_ms=TIMEOUT_MS)
    target.send(source[:0], 7, notify=True, tag=1, timeout_ms=TIMEOUT_MS)  # a notification alone
    assert export.notification(TIMEOUT_MS) == Notice(7, 0, 1, 1, ends[1].serial)
    with pytest.raises(TimeoutError):
        export.notification(timeout_ms=0)
    assert export.arrived().sends == 2
    assert cluster.node(0).counters()["notifications"] == 1


def test_a_sleeping_waiter_is_woken(ends: tuple[Endpoint, Endpoint]) -> None:
    export, target = connect(ends)
    notices: queue.Queue[Notice] = queue.Queue()
    waiter = threading.Thread(target=lambda: notices.put(export.notification(TIMEOUT_MS)))
    waiter.start()
    waiter.join(0.05)  # long enough for it to have gone to sleep
    target.send(ends[1].alloc(8), notify=True, tag=3, timeout_ms=TIMEOUT_MS)
    assert notices.get(timeout=TIMEOUT_S).tag == 3
    waiter.join()


def test_each_export_has_its_own(ends: tuple[Endpoint, Endpoint]) -> None:
    exports, targets = zip(*(connect(ends, name) for name in ("a", "b", "c")), strict=True)
    source = ends[1].alloc(8)
    for tag in range(30):
        targets[tag % 3].send(source, notify=True, tag=tag, timeout_ms=TIMEOUT_MS)
    for which in (2, 0, 1):
        assert [exports[which].notification(0).tag for _ in range(10)] == list(range(which, 30, 3))


def test_handler(ends: tuple[Endpoint, Endpoint]) -> None:
    export, target = connect(ends)
    _, other_target = other = connect(ends, "other")
    source = ends[1].alloc(8)
    target.send(source, notify=True, tag=0, timeout_ms=TIMEOUT_MS)  # before there is a handler
    notices: queue.Queue[tuple[Notice, bool]] = queue.Queue()
    export.on_notification(lambda n: notices.put((n, threading.current_thread() is threading.main_thread())))
    for tag in range(1, 100):
        target.send(source, notify=True, tag=tag, timeout_ms=TIMEOUT_MS)
        other_target.send(source, notify=True, tag=1000 + tag, timeout_ms=TIMEOUT_MS)
    handled = [notices.get(timeout=TIMEOUT_S) for _ in range(100)]
    assert [notice.tag for notice, _ in handled] == list(range(100))
    assert not any(in_main for _, in_main in handled)
    assert [other[0].notification(TIMEOUT_MS).tag for _ in range(99)] == list(range(1001, 1100))

    export.on_notification(None)
    target.send(source, notify=True, tag=5, timeout_ms=TIMEOUT_MS)
    assert export.notification(TIMEOUT_MS).tag == 5
    assert notices.empty()


def test_a_handler_may_use_the_endpoint(ends: tuple[Endpoint, Endpoint]) -> None:
    """Ping-pong between two handlers."""
    rounds, answered, done = 100, threading.Event(), threading.Event()
    there = connect(ends, "there")
    back = (ends[1].export(ends[1].alloc(PAGE), "back"), ends[0].import_(1, "back", timeout_ms=TIMEOUT_MS))
    ping, pong = ends[1].alloc(8), ends[0].alloc(8)

    def on_ping(notice: Notice) -> None:
        back[1].send(pong, notify=True, tag=notice.tag, timeout_ms=TIMEOUT_MS)
        if notice.tag == rounds:
            answered.set()  # the pong may be there before the send that brought it has returned

    def on_pong(notice: Notice) -> None:
        if notice.tag == rounds:
            done.set()
        else:
            there[1].send(ping, notify=True, tag=notice.tag + 1, timeout_ms=TIMEOUT_MS)

    there[0].on_notification(on_ping)
    back[0].on_notification(on_pong)
    there[1].send(ping, notify=True, tag=1, timeout_ms=TIMEOUT_MS)
    assert done.wait(TIMEOUT_S)
    assert answered.wait(TIMEOUT_S)


def test_a_full_ring_is_told_to_the_sender_and_loses_none(ends: tuple[Endpoint, Endpoint]) -> None:
    export, target = connect(ends)
    source = ends[1].alloc(8)
    for tag in range(1024):
        target.send(source, notify=True, tag=tag, timeout_ms=TIMEOUT_MS)
    with pytest.raises(OSError, match="ring is full"):
        target.send(source, notify=True, tag=1024, timeout_ms=TIMEOUT_MS)
    assert [export.notification(0).tag for _ in range(1024)] == list(range(1024))
    target.send(source, notify=True, tag=2000, timeout_ms=TIMEOUT_MS)
    assert export.notification(TIMEOUT_MS).tag == 2000


def test_unexport_drops_those_not_taken(ends: tuple[Endpoint, Endpoint]) -> None:
    export, target = connect(ends)
    target.send(ends[1].alloc(8), notify=True, tag=1, timeout_ms=TIMEOUT_MS)
    export.unexport()
    again, target = connect(ends, "again")
    assert again.id == export.id
    target.send(ends[1].alloc(8), notify=True, tag=2, timeout_ms=TIMEOUT_MS)
    assert again.notification(TIMEOUT_MS).tag == 2
