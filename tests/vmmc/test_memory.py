"""The heap, and the UTLB with its bound: what is allocated, committed, pinned and given back."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vmmc_emu import Cluster, Endpoint
from vmmc_emu._native import ffi, lib

Attach = Callable[..., Endpoint]

PAGE = 4096
TIMEOUT_MS = 20_000


@pytest.fixture
def endpoint(attach: Attach) -> Endpoint:
    """An endpoint on node 0."""
    return attach(0)


def committed(cluster: Cluster, endpoint: Endpoint) -> int:
    """Bytes of an endpoint's segment that take memory."""
    name = f"vmmc.{os.getuid()}.{cluster.name}.node{endpoint.node}.ep{endpoint.serial}.app"
    return (Path("/dev/shm") / name).stat().st_blocks * 512


def test_is_zeroed_and_aligned(endpoint: Endpoint) -> None:
    for length in (1, PAGE, 5 * PAGE + 1):
        buffer = endpoint.alloc(length)
        assert len(buffer) == length
        assert bytes(buffer) == bytes(length)
        assert int(ffi.cast("uintptr_t", ffi.from_buffer(buffer.view))) % PAGE == 0
        buffer[:] = b"x" * length  # the next one finds zeros where this was


def test_is_committed_at_once_and_given_back(cluster: Cluster, endpoint: Endpoint) -> None:
    before = committed(cluster, endpoint)
    buffer = endpoint.alloc(1 << 20)
    assert committed(cluster, endpoint) - before == 1 << 20
    part = buffer[5:10]
    del buffer
    gc.collect()
    assert committed(cluster, endpoint) - before == 1 << 20  # a view of it lives
    del part
    gc.collect()
    assert committed(cluster, endpoint) == before


def test_freed_memory_is_used_again(endpoint: Endpoint) -> None:
    pointer = endpoint._attachment.pointer
    blocks = [lib.vmmc_alloc(pointer, 3 * PAGE) for _ in range(10)]
    for block in blocks[::2]:
        assert lib.vmmc_free(pointer, block) == 0
    again = [lib.vmmc_alloc(pointer, 3 * PAGE) for _ in range(5)]
    assert set(again) == set(blocks[::2])
    for block in blocks:
        assert lib.vmmc_free(pointer, block) == 0
    whole = lib.vmmc_alloc(pointer, 30 * PAGE)
    assert whole == blocks[0]  # neighbours that are free are one


def test_the_heap_has_an_end(endpoint: Endpoint) -> None:
    with pytest.raises(OSError, match="no room"):
        endpoint.alloc((1 << 30) + 1)
    with pytest.raises(OSError, match="argument"):
        endpoint.alloc(0)


def test_what_is_no_memory_of_ours_cannot_be_freed(endpoint: Endpoint) -> None:
    pointer = endpoint._attachment.pointer
    block = lib.vmmc_alloc(pointer, 4 * PAGE)
    for wrong in (block + 1, block + PAGE, ffi.cast("void *", 4096), block - PAGE):
        assert lib.vmmc_free(pointer, wrong) == -1
        assert os.strerror(ffi.errno) == "Invalid argument"
    assert lib.vmmc_free(pointer, ffi.NULL) == 0
    assert lib.vmmc_free(pointer, block) == 0
    assert lib.vmmc_free(pointer, block) == -1


def test_memory_in_use_cannot_be_freed(endpoint: Endpoint) -> None:
    pointer = endpoint._attachment.pointer
    block = lib.vmmc_alloc(pointer, PAGE)
    export = lib.vmmc_export(pointer, block, PAGE, b"buffer", 1, lib.VMMC_ANYONE)
    assert export >= 0
    assert lib.vmmc_free(pointer, block) == -1
    assert os.strerror(ffi.errno) == "Device or resource busy"
    assert lib.vmmc_unexport(pointer, export) == 0
    assert lib.vmmc_free(pointer, block) == 0


def test_any_sequence_of_allocations(endpoint: Endpoint, pattern: Callable[[int], bytes]) -> None:
    live: list[tuple[object, bytes]] = []
    for step in range(400):
        choice = pattern(2)
        if live and choice[0] % 2:
            buffer, contents = live.pop(choice[1] % len(live))
            assert bytes(buffer) == contents, step  # type: ignore[call-overload]
        else:
            contents = pattern(1 + choice[1] * 97)
            buffer = endpoint.alloc(len(contents))
            assert bytes(buffer) == bytes(len(contents))
            buffer[:] = contents
            live.append((buffer, contents))
    for buffer, contents in live:
        assert bytes(buffer) == contents  # type: ignore[call-overload]


# ---- the UTLB ----


def test_pages_stay_pinned_until_the_room_is_wanted(attach: Attach) -> None:
    receiver, sender = attach(0), attach(1, 8 * PAGE)
    receiver.export(receiver.alloc(64 * PAGE), "buffer")
    target = sender.import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    pages = [sender.alloc(PAGE) for _ in range(9)]

    def send(which: int) -> tuple[int, int]:
        target.send(pages[which], timeout_ms=TIMEOUT_MS)
        pinned = sender.pinned()
        assert pinned.in_use_bytes == 0
        assert pinned.pinned_bytes == min(pinned.pins, 8) * PAGE
        return pinned.pins, pinned.unpins

    assert [send(i) for i in range(8)] == [(i + 1, 0) for i in range(8)]
    assert send(0) == (8, 0)  # still there, and now the newest
    assert send(8) == (9, 1)  # unpins the oldest, which is page 1
    assert send(0) == (9, 1)
    assert send(1) == (10, 2)


def test_exports_count_towards_the_bound_and_stay(attach: Attach) -> None:
    endpoint = attach(0, 8 * PAGE)
    first = endpoint.export(endpoint.alloc(5 * PAGE), "first")
    with pytest.raises(OSError, match="VMMC_PIN_BYTES"):
        endpoint.export(endpoint.alloc(4 * PAGE), "second")
    assert endpoint.pinned().in_use_bytes == 5 * PAGE
    second = endpoint.export(endpoint.alloc(3 * PAGE), "second")
    with pytest.raises(OSError, match="VMMC_PIN_BYTES"):  # nothing is left to redirect to
        first.redirect(endpoint.alloc(1))
    second.unexport()
    first.redirect(endpoint.alloc(1)).end()


def test_a_transfer_without_room_fails_and_later_works(attach: Attach) -> None:
    receiver, sender = attach(0), attach(1, 4 * PAGE)
    receiver.export(receiver.alloc(PAGE), "buffer")
    target = sender.import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    hog = sender.export(sender.alloc(4 * PAGE), "hog")
    source = sender.alloc(PAGE)
    with pytest.raises(OSError, match="VMMC_PIN_BYTES"):
        target.send(source, timeout_ms=TIMEOUT_MS)
    hog.unexport()
    target.send(source, timeout_ms=TIMEOUT_MS)


def test_the_nic_counts_hits_misses_and_evictions(attach: Attach, cluster: Cluster) -> None:
    receiver, sender = attach(0), attach(1)
    receiver.export(receiver.alloc(PAGE), "buffer")
    target = sender.import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    source = sender.alloc(PAGE)
    before = cluster.node(1).counters()
    for _ in range(10):
        target.send(source, timeout_ms=TIMEOUT_MS)
    after = cluster.node(1).counters()
    assert after["utlb_misses"] - before["utlb_misses"] == 1
    assert after["utlb_hits"] - before["utlb_hits"] == 9
    # More pages than the NIC has places for.
    large = sender.alloc(32 << 20)
    for at in range(0, len(large), PAGE):
        target.post_send(large[at : at + 1]).wait(TIMEOUT_MS)
    assert cluster.node(1).counters()["utlb_evictions"] > 0


@pytest.mark.parametrize("nonsense", ["", "x", "-1", "12", "1e9"])
def test_nonsense_in_the_environment(
    attach: Attach, nonsense: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VMMC_PIN_BYTES", nonsense)
    assert attach(0).pinned().limit_bytes == 64 << 20
    assert capfd.readouterr().err.count("\n") == (1 if nonsense else 0)
