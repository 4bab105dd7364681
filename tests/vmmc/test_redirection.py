"""Redirection of an exported buffer: whatever its timing, every byte is where the library says it is.

Each test compares byte by byte, and the NIC's counters tell how many bytes went to the posted address and
how many to the exported buffer.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmmc_emu import Cluster, Endpoint
from vmmc_emu.vmmc import Buffer, Export, Import, Redirected, Redirection

SIZE = 256 * 1024
PAGE = 4096
TIMEOUT_MS = 20_000

Attach = Callable[..., Endpoint]
Pattern = Callable[[int], bytes]


class Line:
    """An export on node 0 and its import on node 1, with what is needed to send into it."""

    def __init__(
        self, cluster: Cluster, attach: Attach, size: int = SIZE, pin_bytes: int | None = None
    ) -> None:
        self.cluster = cluster
        self.size = size
        self.receiver: Endpoint = attach(0)
        self.sender: Endpoint = attach(1, pin_bytes)
        self.buffer: Buffer = self.receiver.alloc(size)
        self.inbox: Export = self.receiver.export(self.buffer, "inbox")
        self.target: Import = self.sender.import_(0, "inbox", timeout_ms=TIMEOUT_MS)
        self.source: Buffer = self.sender.alloc(size)
        self._before = cluster.node(0).counters()

    def send(self, data: bytes, offset: int) -> None:
        """Sends, and returns when the bytes are in place."""
        self.source[: len(data)] = data
        self.target.send(self.source[: len(data)], offset, timeout_ms=TIMEOUT_MS)

    def restart(self) -> None:
        """As if nothing had ever arrived."""
        self.inbox.unexport()
        self.buffer[:] = bytes(self.size)
        self.inbox = self.receiver.export(self.buffer, "inbox")
        self.target.unimport()
        self.target = self.sender.import_(0, "inbox", timeout_ms=TIMEOUT_MS)
        self._before = self.cluster.node(0).counters()

    def redirected(self) -> int:
        """Bytes that the NIC has placed at posted addresses since the beginning."""
        return self._since("bytes_redirected")

    def default(self) -> int:
        """Bytes that the NIC has placed in the exported buffer since the beginning."""
        return self._since("bytes_default")

    def _since(self, name: str) -> int:
        return int(self.cluster.node(0).counters()[name] - self._before[name])


@pytest.fixture
def line(attach: Attach, cluster: Cluster) -> Line:
    """A line between two nodes."""
    return Line(cluster, attach)


@pytest.mark.parametrize("length", [1, 63, PAGE, PAGE + 1, 100_000, SIZE])
def test_posted_before_the_message(line: Line, pattern: Pattern, length: int) -> None:
    message = pattern(length)
    destination = line.receiver.alloc(length)
    redirection = line.inbox.redirect(destination)
    line.send(message, 0)
    assert redirection.wait(timeout_ms=TIMEOUT_MS) == Redirected(0, length)
    assert redirection.end() == Redirected(0, length)
    assert bytes(destination) == message
    assert bytes(line.buffer) == bytes(SIZE)  # not a byte touched it
    assert (line.redirected(), line.default()) == (length, 0)


def test_posted_after_the_message(line: Line, pattern: Pattern) -> None:
    message = pattern(SIZE)
    line.send(message, 0)
    destination = line.receiver.alloc(SIZE)
    result = line.inbox.redirect(destination).end()
    assert len(result) == 0
    assert bytes(line.buffer) == message
    assert bytes(destination) == bytes(SIZE)
    assert (line.redirected(), line.default()) == (0, SIZE)


def test_posted_in_the_middle_of_a_message(attach: Attach, cluster: Cluster, pattern: Pattern) -> None:
    # With 64 KiB pinned at most, a send goes in pieces of 32 KiB, which follow each other only while the
    # sender waits: its second part is held back until the redirection is posted.
    line = Line(cluster, attach, pin_bytes=64 * 1024)
    message = pattern(SIZE)
    line.source[:] = message
    transfer = line.target.post_send(line.source.view, notify=True, tag=5)
    while line.inbox.arrived().bytes < 64 * 1024:
        os.sched_yield()
    assert not line.inbox.arrived().sends
    destination = line.receiver.alloc(SIZE)
    redirection = line.inbox.redirect(destination)
    transfer.wait(TIMEOUT_MS)
    result = redirection.end()

    assert result == Redirected(64 * 1024, SIZE)
    assert bytes(line.buffer[: result.start]) == message[: result.start]
    assert bytes(destination[result.start :]) == message[result.start :]
    assert bytes(line.buffer[result.start :]) == bytes(SIZE - result.start)
    assert bytes(destination[: result.start]) == bytes(result.start)
    assert (line.redirected(), line.default()) == (SIZE - 64 * 1024, 64 * 1024)
    # The notification speaks of the whole message all the same.
    notice = line.inbox.notification(TIMEOUT_MS)
    assert (notice.offset, notice.length, notice.tag, notice.node) == (0, SIZE, 5, 1)


def test_posted_at_any_moment_of_a_long_message(attach: Attach, cluster: Cluster, pattern: Pattern) -> None:
    size = 8 << 20
    line = Line(cluster, attach, size)
    destination = line.receiver.alloc(size)
    sent = redirected = 0
    for _ in range(20):
        message = pattern(size)
        line.source[:] = message
        transfer = line.target.post_send(line.source.view)
        early = line.inbox.redirect(destination).end()
        redirection = line.inbox.redirect(destination)
        transfer.wait(TIMEOUT_MS)
        late = redirection.end()
        whole = bytearray(line.buffer.view)
        for run in (early, late):
            whole[run.start : run.stop] = destination[run.start : run.stop]
        assert whole == message
        assert early.stop <= late.start or not len(early) or not len(late)
        sent += size
        redirected += len(early) + len(late)
        assert (line.redirected(), line.default()) == (redirected, sent - redirected)


def test_ended_before_anything_arrived(line: Line, pattern: Pattern) -> None:
    destination = line.receiver.alloc(SIZE)
    assert len(line.inbox.redirect(destination).end()) == 0
    message = pattern(SIZE)
    line.send(message, 0)
    assert bytes(line.buffer) == message
    assert bytes(destination) == bytes(SIZE)
    assert (line.redirected(), line.default()) == (0, SIZE)
    assert line.cluster.node(0).counters()["redirections_cancelled"] == 1


def test_ended_in_the_middle_of_a_message(attach: Attach, cluster: Cluster, pattern: Pattern) -> None:
    line = Line(cluster, attach, pin_bytes=64 * 1024)
    message = pattern(SIZE)
    destination = line.receiver.alloc(SIZE)
    redirection = line.inbox.redirect(destination)
    line.source[:] = message
    transfer = line.target.post_send(line.source.view)
    assert redirection.wait(64 * 1024, TIMEOUT_MS).stop == 64 * 1024
    result = redirection.end()
    assert result == Redirected(0, 64 * 1024)
    destination[:] = bytes(SIZE)  # it is ours again: nothing may be written there any more
    transfer.wait(TIMEOUT_MS)
    assert bytes(destination) == bytes(SIZE)
    assert bytes(line.buffer) == bytes(64 * 1024) + message[64 * 1024 :]
    assert (line.redirected(), line.default()) == (64 * 1024, SIZE - 64 * 1024)


def test_moved_to_another_address(line: Line, pattern: Pattern) -> None:
    message, third = pattern(3 * PAGE), PAGE
    one, other = line.receiver.alloc(3 * PAGE), line.receiver.alloc(3 * PAGE)
    redirection = line.inbox.redirect(one)
    line.send(message[:third], 0)
    assert redirection.end() == Redirected(0, third)
    moved = line.inbox.redirect(other)
    line.send(message[third:], third)
    assert moved.end() == Redirected(third, 3 * PAGE)
    assert bytes(one) == message[:third] + bytes(2 * PAGE)
    assert bytes(other) == bytes(third) + message[third:]
    assert (line.redirected(), line.default()) == (3 * PAGE, 0)


def test_two_in_turn_on_neighbouring_ranges(line: Line, pattern: Pattern) -> None:
    message = pattern(2 * PAGE)
    destinations = [line.receiver.alloc(PAGE), line.receiver.alloc(PAGE)]
    first = line.inbox.redirect(destinations[0], 0)
    line.send(message[:PAGE], 0)
    assert first.end() == Redirected(0, PAGE)
    second = line.inbox.redirect(destinations[1], PAGE)
    line.send(message[PAGE:], PAGE)
    assert second.end() == Redirected(PAGE, 2 * PAGE)
    assert b"".join(map(bytes, destinations)) == message
    assert (line.redirected(), line.default()) == (2 * PAGE, 0)


def test_many_small_messages_into_one(line: Line, pattern: Pattern) -> None:
    destination = line.receiver.alloc(10_000)
    redirection = line.inbox.redirect(destination, 500)
    expected = b""
    while len(expected) < 10_000:
        message = pattern(1 + len(expected) % 97)[: 10_000 - len(expected)]
        line.send(message, 500 + len(expected))
        expected += message
    assert redirection.end() == Redirected(500, 10_500)
    assert bytes(destination) == expected
    assert bytes(line.buffer) == bytes(SIZE)
    assert (line.redirected(), line.default()) == (10_000, 0)


def test_shorter_than_the_message(line: Line, pattern: Pattern) -> None:
    message = pattern(10_000)
    destination = line.receiver.alloc(1000)
    redirection = line.inbox.redirect(destination, 3000)
    line.send(message, 0)
    assert redirection.end() == Redirected(3000, 4000)
    assert bytes(destination) == message[3000:4000]
    assert bytes(line.buffer[:10_000]) == message[:3000] + bytes(1000) + message[4000:]
    assert (line.redirected(), line.default()) == (1000, 9000)


def test_what_does_not_continue_the_run_goes_to_the_buffer(line: Line, pattern: Pattern) -> None:
    destination = line.receiver.alloc(1000)
    redirection = line.inbox.redirect(destination, 0)
    first, apart, more = pattern(100), pattern(100), pattern(100)
    line.send(first, 0)
    line.send(apart, 500)
    line.send(more, 100)
    assert redirection.end() == Redirected(0, 200)
    assert bytes(destination) == first + more + bytes(800)
    assert bytes(line.buffer[:1000]) == bytes(500) + apart + bytes(400)
    assert (line.redirected(), line.default()) == (200, 100)


def test_up_to_the_end_of_the_buffer(line: Line, pattern: Pattern) -> None:
    message = pattern(PAGE)
    destination = line.receiver.alloc(PAGE)
    redirection = line.inbox.redirect(destination, SIZE - PAGE)
    line.send(message, SIZE - PAGE)
    assert redirection.end() == Redirected(SIZE - PAGE, SIZE)
    assert bytes(destination) == message
    with pytest.raises(OSError, match="not in the exported buffer"):
        line.inbox.redirect(destination, SIZE - PAGE + 1)


def test_one_at_a_time(line: Line) -> None:
    destination = line.receiver.alloc(PAGE)
    redirection = line.inbox.redirect(destination)
    with pytest.raises(OSError, match="in use"):
        line.inbox.redirect(destination)
    redirection.end()
    line.inbox.redirect(destination).end()


def test_waiting_gives_up_after_its_timeout_and_can_go_on(line: Line, pattern: Pattern) -> None:
    destination = line.receiver.alloc(PAGE)
    redirection = line.inbox.redirect(destination)
    line.send(pattern(100), 0)
    with pytest.raises(TimeoutError):
        redirection.wait(timeout_ms=1)
    assert redirection.wait(100, timeout_ms=0) == Redirected(0, 100)
    line.send(pattern(PAGE - 100), 100)
    assert redirection.wait(timeout_ms=TIMEOUT_MS) == Redirected(0, PAGE)


def test_unexport_ends_it(line: Line) -> None:
    destination = line.receiver.alloc(PAGE)
    redirection = line.inbox.redirect(destination)
    line.inbox.unexport()
    with pytest.raises(OSError, match="argument"):
        redirection.end()
    assert line.receiver.pinned().in_use_bytes == 0


class Model:
    """What must be in the buffer and in the destinations, said without any concurrency."""

    def __init__(self) -> None:
        self.buffer = bytearray(SIZE)
        self.offset = self.length = 0
        self.run: range | None = None
        self.destination = bytearray()
        self.redirected = self.default = 0

    def post(self, offset: int, length: int) -> None:
        self.offset, self.length, self.run, self.destination = offset, length, None, bytearray(length)

    def end(self) -> Redirected:
        run = self.run or range(self.offset, self.offset)
        self.length, self.run = 0, None
        return Redirected(run.start, run.stop)

    def send(self, data: bytes, offset: int) -> None:
        """One ascending run: it begins inside the range and goes on with what begins where it ended."""
        end = self.offset + self.length
        start = max(offset, self.offset)
        continues = start < end and (self.run is None or start == self.run.stop)
        for at, byte in enumerate(data, offset):
            if continues and start <= at < end:
                self.run = range(start if self.run is None else self.run.start, at + 1)
                self.destination[at - self.offset] = byte
                self.redirected += 1
            else:
                self.buffer[at] = byte
                self.default += 1


_ranges = st.tuples(st.integers(0, 300), st.integers(1, 200))
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("send"), _ranges),
        st.tuples(st.just("post"), _ranges),
        st.tuples(st.just("end"), st.none()),
    ),
    max_size=30,
)


def test_any_sequence_agrees_with_the_model(line: Line) -> None:
    contents = random.Random()
    destination = line.receiver.alloc(PAGE)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(_steps)
    def run(steps: list[tuple[str, tuple[int, int] | None]]) -> None:
        model = Model()
        line.restart()
        posted: list[Redirection] = []
        contents.seed(0)

        def end() -> None:
            if posted:
                assert posted.pop().end() == model.end()

        for what, where in steps:
            if what == "end":
                end()
            elif what == "post" and where:
                end()
                destination[: where[1]] = bytes(where[1])
                posted.append(line.inbox.redirect(destination[: where[1]], where[0]))
                model.post(*where)
            elif where:
                data = contents.randbytes(where[1])
                line.send(data, where[0])
                model.send(data, where[0])
            assert line.buffer[:600] == model.buffer[:600]
            if posted:
                assert destination[: model.length] == model.destination
        end()
        assert (line.redirected(), line.default()) == (model.redirected, model.default)

    run()
