"""What a faulty wire does to programs: nothing but time, until a peer is given up.

Schedules of faults, sizes, directions and the timing of redirections are drawn at random, and every stream is
compared byte by byte with what was sent.  A few of them, always the same; ever new ones for
VMMC_SOAK_MINUTES (`make soak`).
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vmmc_emu
from vmmc_emu import Cluster, observe, vmmc, wires
from vmmc_emu.paths import native_file
from vmmc_emu.wires import Change

SOAK_S = float(os.environ.get("VMMC_SOAK_MINUTES", "0")) * 60
TESTS = 2  # that share the time of a soak
EXAMPLES = 100
PORT = 7000
US, MS, SECOND = 1000, 10**6, 10**9
TIMEOUT_MS = 60_000

Settings = Mapping[str, Any]
Wires = tuple[Settings, Settings]  # from node 0 to node 1, and back


def set_wires(cluster: Cluster, there: Settings, back: Settings) -> None:
    """The wires from node 0 to node 1 and back, and nothing of what they were before."""
    changes = [Change([0], [1], there, reset=True), Change([1], [0], back, reset=True)]
    wires.change(cluster.place, changes)


class Pair:
    """A program on each of two nodes, joined by a connection."""

    def __init__(self, cluster: Cluster, path: str) -> None:
        self.cluster = cluster
        self.ends: list[subprocess.Popen[str]] = []
        for node, arguments in ((1, ["listen", str(PORT)]), (0, ["connect", str(PORT), "node1"])):
            end = cluster.node(node).popen(
                [path, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self.ends.insert(0, end)
            assert end.stdout is not None
            assert end.stdout.readline() == "ready\n"

    def close(self) -> None:
        """Ends the programs."""
        for end in self.ends:
            end.kill()
            end.communicate()

    def begin(self, line: Mapping[str, Any]) -> None:
        """Both begin an exchange: see tests/programs/exchange.c."""
        there, back = line["there"], line["back"]
        for end, sends, receives in ((self.ends[0], there, back), (self.ends[1], back, there)):
            numbers = [int(line["fresh"]), sends["seed"], sends["bytes"], sends["chunk"]]
            numbers += [receives["seed"], receives["bytes"], receives["read"]]
            numbers += [int(receives["redirected"]), receives["pauses"]]
            assert end.stdin is not None
            end.stdin.write(" ".join(map(str, numbers)) + "\n")
            end.stdin.flush()

    def finish(self) -> None:
        """Both have received what was sent."""
        for end in self.ends:
            assert end.stdout is not None
            assert end.stdout.readline() == "ok\n"


@pytest.fixture
def cluster(two_nodes: Cluster) -> Iterator[Cluster]:
    """Two nodes whose wires are perfect before and after."""
    yield two_nodes
    set_wires(two_nodes, {}, {})


@pytest.fixture
def pair(cluster: Cluster, program: Callable[..., str]) -> Iterator[Pair]:
    """The programs."""
    directory = native_file("libvmmc.so").parent
    found = Pair(cluster, program("exchange", f"-L{directory}", "-lvmmc", f"-Wl,-rpath,{directory}"))
    yield found
    found.close()


def stream(size: int, seed: int = 1, chunk: int = 1 << 20) -> dict[str, Any]:
    """One direction of an exchange."""
    return {
        "seed": seed, "bytes": size, "chunk": chunk, "read": chunk, "redirected": False, "pauses": 0,
    }  # fmt: skip


# ---- random schedules ----

# Jitter is at most the delay: no packet takes longer for it than two milliseconds.
DELAYS = st.sampled_from([(delay, jitter) for delay in (10 * US, MS) for jitter in (0, delay // 2, delay)])


def with_delays(wire: Mapping[str, Any]) -> Settings:
    """The delay and the jitter that were drawn together, as settings."""
    found = dict(wire)
    if "delays" in found:
        found["delay_ns"], found["jitter_ns"] = found.pop("delays")
    return found


WIRES = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**32)},
    optional={
        "loss": st.sampled_from([0.01, 0.05, 0.3]),
        "corrupt": st.sampled_from([0.01, 0.1]),
        "duplicate": st.sampled_from([0.02, 0.3]),
        "reorder": st.sampled_from([0.1, 0.5]),
        "delays": DELAYS,
        "rate_bits_per_s": st.sampled_from([10**8, 10**9, 10**10]),
        "limit_packets": st.sampled_from([4, 64]),
    },
).map(with_delays)
CUT = st.just({"up": False})
SCHEDULES = st.lists(st.tuples(st.one_of(WIRES, CUT), st.one_of(WIRES, CUT)), max_size=3)
SIZES = st.one_of(st.integers(0, 100), st.integers(0, 1 << 18))
STREAMS = st.fixed_dictionaries(
    {
        "seed": st.integers(1, 2**32),
        "bytes": SIZES,
        "chunk": st.sampled_from([1, 100, 5000, 1 << 16, 1 << 20]),
        "read": st.sampled_from([1000, 1 << 16, 1 << 20]),
        "redirected": st.booleans(),
        "pauses": st.sampled_from([0, 10, 1000]),
    }
).map(lambda each: {**each, "bytes": min(each["bytes"], 200 * each["chunk"])})
EXCHANGES = st.fixed_dictionaries({"fresh": st.booleans(), "there": STREAMS, "back": STREAMS})

drawn = settings(
    max_examples=EXAMPLES,
    derandomize=not SOAK_S,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def for_a_while(check: Callable[[], None]) -> None:
    """A check of some examples once; in a soak, with ever new ones for this test's share of its time."""
    end = time.monotonic() + SOAK_S / TESTS
    check()
    while time.monotonic() < end:
        check()


def test_schedules_have_every_fault() -> None:
    """And no wire that cannot be."""
    seen: set[str] = set()

    @drawn
    @given(wire=WIRES)
    def look(wire: Settings) -> None:
        wires.Wire.checked(wires.Wire(), wire)
        seen.update(name for name, value in wire.items() if value)

    look()
    faults = {"delay_ns", "jitter_ns", "rate_bits_per_s", "limit_packets", "seed"}
    assert seen == faults.union(wires.PROBABILITIES)


@pytest.mark.native
def test_streams_are_what_was_sent_whatever_the_wires_do(pair: Pair) -> None:
    """Faults of every kind that change while bytes are under way, both directions at once."""

    @drawn
    @given(exchange=EXCHANGES, first=st.tuples(WIRES, WIRES), later=SCHEDULES)
    def check(exchange: dict[str, Any], first: Wires, later: list[Wires]) -> None:
        set_wires(pair.cluster, *first)
        pair.begin(exchange)
        for there, back in later:
            set_wires(pair.cluster, there, back)
        set_wires(pair.cluster, *first)
        pair.finish()

    for_a_while(check)


def test_sends_and_fetches_are_whole_whatever_the_wires_do(cluster: Cluster) -> None:
    """Each arrives once, in order, is told once, and can be fetched back."""
    lengths_drawn = st.lists(st.one_of(st.integers(1, 5000), st.integers(1, 1 << 19)), min_size=1, max_size=8)

    @drawn
    @given(
        first=st.tuples(WIRES, WIRES),
        later=SCHEDULES,
        seed=st.integers(0, 2**32),
        redirected=st.booleans(),
        lengths=lengths_drawn,
    )
    def check(first: Wires, later: list[Wires], seed: int, redirected: bool, lengths: list[int]) -> None:
        total = sum(lengths)
        set_wires(cluster, *first)
        with (
            vmmc_emu.attach(0, cluster=cluster.name) as here,
            vmmc_emu.attach(1, cluster=cluster.name) as there,
        ):
            export = there.export(there.alloc(total), "buffer", permissions=vmmc.READ | vmmc.WRITE)
            target = here.import_(1, "buffer", timeout_ms=TIMEOUT_MS)
            source, fetched, aside = here.alloc(total), here.alloc(total), there.alloc(total)
            source[:] = random.Random(seed).randbytes(total)
            with export.redirect(aside) if redirected else contextlib.nullcontext():
                offsets = [sum(lengths[:n]) for n in range(len(lengths))]
                transfers = [
                    target.post_send(source[at : at + length], at, notify=True, tag=at)
                    for at, length in zip(offsets, lengths, strict=True)
                ]
                for wires_there, wires_back in later:
                    set_wires(cluster, wires_there, wires_back)
                set_wires(cluster, *first)
                for transfer in transfers:
                    transfer.wait(TIMEOUT_MS)
                for at, length in zip(offsets, lengths, strict=True):
                    notice = export.notification(TIMEOUT_MS)
                    assert (notice.offset, notice.length, notice.tag) == (at, length, at)
            assert bytes(aside if redirected else export.memory) == bytes(source)
            if redirected:
                export.memory[:] = source[:]
            target.fetch(fetched, 0, timeout_ms=TIMEOUT_MS)
            assert bytes(fetched) == bytes(source)
            with pytest.raises(TimeoutError):
                export.notification(timeout_ms=0)

    for_a_while(check)


# ---- what is found, and what it costs ----


@pytest.mark.native
def test_everything_at_once_and_much_of_it(pair: Pair) -> None:
    """Loss, corruption, duplicates and reordering; all are counted, and nothing is lost, on either side."""
    faults = {"loss": 0.05, "corrupt": 0.01, "duplicate": 0.02, "reorder": 0.1, "seed": 3}
    set_wires(pair.cluster, faults, faults)
    size = 1 << 30 if SOAK_S else 1 << 25
    pair.begin({"fresh": True, "there": stream(size), "back": stream(size // 16)})
    pair.finish()
    found = observe.link_counters(pair.cluster.name, 0, 1)
    for name in ("dropped", "corrupted", "duplicated", "reordered"):
        assert found[f"wire_{name}"] > 0
    assert found["packets_resent"] >= found["wire_dropped"] // 2  # acknowledgements are dropped too
    # What the wire lost after it had corrupted it was never looked at.
    assert 0 < found["corrupt_found"] <= found["wire_corrupted"] + found["wire_duplicated"]
    assert found["round_trip_ns"] > 0
    # An acknowledgement that was lost is still being asked for: the numbers may grow while they are read.
    dropped = pair.cluster.node(1).counters()["wire_dropped"]
    resent = pair.cluster.node(0).counters()["packets_resent"]
    later = observe.link_counters(pair.cluster.name, 0, 1)
    assert found["wire_dropped"] <= dropped <= later["wire_dropped"]
    assert found["packets_resent"] <= resent <= later["packets_resent"]


@pytest.mark.native
@pytest.mark.skipif(not SOAK_S, reason="measures: for a quiet machine (make soak)")
def test_a_lost_packet_in_a_hundred_leaves_most_of_the_rate(pair: Pair) -> None:
    """More than 60 % of what the same rate gives without loss."""

    def seconds(faults: Settings) -> float:
        set_wires(pair.cluster, {"rate_bits_per_s": 10**9, **faults}, {"rate_bits_per_s": 10**9, **faults})
        began = time.monotonic()
        pair.begin({"fresh": True, "there": stream(1 << 27), "back": stream(0)})
        pair.finish()
        return time.monotonic() - began

    seconds({})
    perfect, lossy = (sorted(seconds(faults) for _ in range(3))[1] for faults in ({}, {"loss": 0.01}))
    print(f"goodput with 1 % loss: {perfect / lossy:.0%} of {(1 << 27) * 8 / perfect / 1e6:.0f} mbit/s")
    assert perfect / lossy > 0.6


@pytest.mark.native
def test_a_change_takes_effect_under_way_and_its_end_as_well(pair: Pair) -> None:
    """A stream stands still while the wire is cut, and goes on, byte for byte."""
    set_wires(pair.cluster, {}, {})
    name = pair.cluster.name
    pair.begin({"fresh": True, "there": stream(1 << 28), "back": stream(1 << 20)})
    before = observe.link_counters(name, 0, 1)["wire_dropped"]
    set_wires(pair.cluster, {"up": False}, {})
    while observe.link_counters(name, 0, 1)["wire_dropped"] < before + 3:
        time.sleep(0.001)
    set_wires(pair.cluster, {}, {})
    pair.finish()


@pytest.mark.native
def test_more_than_the_wire_holds_is_dropped_and_said_again(pair: Pair) -> None:
    """`limit`: what enters when so many packets are under way is dropped; the stream is whole."""
    set_wires(pair.cluster, {"delay_ns": 5 * MS, "limit_packets": 2}, {})
    before = observe.link_counters(pair.cluster.name, 0, 1)
    pair.begin({"fresh": True, "there": stream(1 << 21, chunk=4096), "back": stream(0)})
    pair.finish()
    found = observe.link_counters(pair.cluster.name, 0, 1)
    assert found["wire_dropped"] > before["wire_dropped"]
    assert found["packets_resent"] > before["packets_resent"]


@pytest.mark.native
def test_a_slow_reader_has_nothing_dropped(pair: Pair) -> None:
    """Flow control keeps back what has no room; the wire has a delay, so that much could be under way."""
    set_wires(pair.cluster, {"delay_ns": 200 * US}, {"delay_ns": 200 * US})

    def so_far() -> dict[str, int]:
        found = observe.link_counters(pair.cluster.name, 0, 1)
        return {**found, "refused": pair.cluster.node(1).counters()["packets_dropped"]}

    before = so_far()
    slow = {**stream(1 << 24), "read": 10_000, "pauses": 7}
    pair.begin({"fresh": True, "there": slow, "back": stream(0)})
    pair.finish()
    more = {name: value - before[name] for name, value in so_far().items()}
    assert more["wire_dropped"] == more["corrupt_found"] == 0
    assert more["refused"] == more["duplicates_found"]  # never what came for the first time


def round_trips(cluster: Cluster, count: int) -> list[float]:
    """Seconds that a byte takes there and back."""

    def serve() -> None:
        with socket.create_server(("", PORT + 1)) as listener, listener.accept()[0] as connection:
            while data := connection.recv(1):
                connection.sendall(data)

    def play(count: int) -> list[float]:
        found = []
        with socket.create_connection(("node1", PORT + 1)) as connection:
            for _ in range(count):
                began = time.monotonic()
                connection.sendall(b"x")
                connection.recv(1)
                found.append(time.monotonic() - began)
        return found

    served = cluster.node(1).submit(serve)
    cluster.node(1).wait_for_port(PORT + 1)
    found: list[float] = cluster.node(0).submit(play, count).result(60)
    served.result(60)
    return found


def test_jitter_makes_some_packets_sooner_and_some_later(cluster: Cluster) -> None:
    """Never sooner than the delay less the jitter; without jitter none comes before the delay is over."""
    set_wires(cluster, {"delay_ns": 4 * MS}, {})
    assert min(round_trips(cluster, 5)) >= 0.004
    set_wires(cluster, {"delay_ns": 4 * MS, "jitter_ns": 3 * MS, "seed": 5}, {})
    found = round_trips(cluster, 40)
    assert 0.001 <= min(found) < 0.004
    assert max(found) >= 0.004
