"""Sends and fetches: what arrives, where, in which order, and what the ends of buffers do."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest

from vmmc_emu import Endpoint
from vmmc_emu.vmmc import READ, WRITE, Import

PAGE = 4096
TIMEOUT_MS = 20_000

Attach = Callable[..., Endpoint]
Pattern = Callable[[int], bytes]


def connect(
    ends: tuple[Endpoint, Endpoint], length: int, permissions: int = WRITE
) -> tuple[memoryview, Import]:
    """A buffer on node 0 and node 1's import of it."""
    buffer = ends[0].alloc(length)
    ends[0].export(buffer[:length], "buffer", permissions=permissions)
    return buffer.view, ends[1].import_(0, "buffer", timeout_ms=TIMEOUT_MS)


def test_import_tells_what_was_exported(ends: tuple[Endpoint, Endpoint]) -> None:
    export = ends[0].export(ends[0].alloc(5000), permissions=READ)
    imported = ends[1].import_(0, export.number, timeout_ms=TIMEOUT_MS)
    assert (imported.node, imported.length, imported.permissions) == (0, 5000, READ)


@pytest.mark.parametrize("length", [0, 1, 7, 64, PAGE - 1, PAGE, 3 * PAGE + 5, 256 * 1024 + 1, 3 << 20])
@pytest.mark.parametrize(("here", "there"), [(0, 0), (3, 5001), (PAGE, 1)])
def test_any_offset_to_any_offset(
    ends: tuple[Endpoint, Endpoint], pattern: Pattern, length: int, here: int, there: int
) -> None:
    buffer, target = connect(ends, length + there + 100)
    source, message = ends[1].alloc(length + here + 1), pattern(length)
    source[here : here + length] = message
    target.send(source[here : here + length], there, timeout_ms=TIMEOUT_MS)
    assert buffer == bytes(there) + message + bytes(100)


def test_fetch(ends: tuple[Endpoint, Endpoint], pattern: Pattern) -> None:
    buffer, target = connect(ends, 1 << 20, READ)
    buffer[:] = message = pattern(1 << 20)
    destination = ends[1].alloc(2 << 20)
    target.fetch(destination[5 : 5 + (1 << 20)], timeout_ms=TIMEOUT_MS)
    assert bytes(destination[: 10 + (1 << 20)]) == bytes(5) + message + bytes(5)
    target.fetch(destination[:100], 777, timeout_ms=TIMEOUT_MS)
    assert destination[:100] == message[777:877]


def test_a_node_to_itself_and_to_the_same_process(attach: Attach, pattern: Pattern) -> None:
    endpoint = attach(1)
    buffer, source = endpoint.alloc(PAGE), endpoint.alloc(PAGE)
    endpoint.export(buffer, "self")
    source[:] = message = pattern(PAGE)
    endpoint.import_(1, "self", timeout_ms=TIMEOUT_MS).send(source, timeout_ms=TIMEOUT_MS)
    assert bytes(buffer) == message


def test_sends_arrive_in_the_order_in_which_they_were_given(ends: tuple[Endpoint, Endpoint]) -> None:
    # Each long send is followed by a short one that counts it: when the count is seen, the long one is there.
    rounds, size = 40, 1 << 20
    buffer, target = connect(ends, size + 8)
    source, counts = ends[1].alloc(size), ends[1].alloc(8 * rounds)
    for i in range(rounds):
        struct.pack_into("<Q", counts.view, 8 * i, i + 1)
    for i in range(rounds):
        source[:] = bytes([i + 1]) * size
        sends = [
            target.post_send(source.view),
            target.post_send(counts[8 * i : 8 * i + 8], size),
        ]
        while struct.unpack_from("<Q", buffer, size) != (i + 1,):
            os.sched_yield()
        assert buffer[size - 1] == buffer[0] == i + 1
        for send in sends:
            send.wait(TIMEOUT_MS)


def test_many_under_way_at_once(ends: tuple[Endpoint, Endpoint]) -> None:
    count = 1000
    buffer, target = connect(ends, 8 * count)
    source = ends[1].alloc(8 * count)
    for i in range(count):
        struct.pack_into("<Q", source.view, 8 * i, i * i)
    transfers = [target.post_send(source[8 * i : 8 * i + 8], 8 * i) for i in range(count)]
    for transfer in reversed(transfers):  # any order will do
        transfer.wait(TIMEOUT_MS)
    assert buffer == bytes(source)


def test_too_many_under_way_is_an_error_that_passes(ends: tuple[Endpoint, Endpoint]) -> None:
    _, target = connect(ends, PAGE)
    source = ends[1].alloc(PAGE)
    transfers = [target.post_send(source[:1]) for _ in range(1024)]
    with pytest.raises(BlockingIOError, match="too many"):
        target.post_send(source[:1])
    for transfer in transfers:
        transfer.wait(TIMEOUT_MS)
    target.send(source[:1], timeout_ms=TIMEOUT_MS)


def test_a_transfer_is_done_once(ends: tuple[Endpoint, Endpoint]) -> None:
    _, target = connect(ends, PAGE)
    transfer = target.post_send(ends[1].alloc(PAGE))
    while not transfer.done():
        pass
    transfer.wait()
    assert transfer.done()


@pytest.mark.parametrize("pin_pages", [2, 3, 16])
def test_transfers_larger_than_what_may_be_pinned(attach: Attach, pattern: Pattern, pin_pages: int) -> None:
    size = 100 * PAGE + 17
    ends = attach(0), attach(1, pin_pages * PAGE)
    buffer, target = connect(ends, size, READ | WRITE)
    source, back = ends[1].alloc(size), ends[1].alloc(size)
    source[:] = message = pattern(size)
    target.send(source[1:], 1, timeout_ms=TIMEOUT_MS)
    assert buffer == b"\0" + message[1:]
    target.fetch(back[1:], 1, timeout_ms=TIMEOUT_MS)
    assert bytes(back) == b"\0" + message[1:]
    pinned = ends[1].pinned()
    assert pinned.pinned_bytes <= pinned.limit_bytes == pin_pages * PAGE
    assert pinned.in_use_bytes == 0
    assert pinned.unpins >= 100


def test_half_a_gigabyte(attach: Attach) -> None:
    size = 512 << 20
    receiver, sender = attach(0, 1 << 30), attach(1)
    buffer = receiver.alloc(size)
    receiver.export(buffer, "large")
    source = sender.alloc(size)
    for at in range(0, size, 1 << 20):
        struct.pack_into("<Q", source.view, at, at)
    sender.import_(0, "large", timeout_ms=TIMEOUT_MS).send(source, timeout_ms=60_000)
    assert all(struct.unpack_from("<Q", buffer.view, at) == (at,) for at in range(0, size, 1 << 20))


def test_timeouts_leave_the_endpoint_usable(attach: Attach) -> None:
    receiver, sender = attach(0), attach(1)
    export = receiver.export(receiver.alloc(PAGE), "slow")
    target = sender.import_(0, "slow", timeout_ms=TIMEOUT_MS)
    source = sender.alloc(PAGE)
    with pytest.raises(TimeoutError):
        export.notification(timeout_ms=1)
    transfer = target.post_send(source, notify=True)
    export.notification(TIMEOUT_MS)
    transfer.wait(TIMEOUT_MS)
    with pytest.raises(TimeoutError):
        export.notification(timeout_ms=0)
