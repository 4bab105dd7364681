"""Redirection under the stream sockets: a receive into memory of the VMMC heap needs no copy.

The program, redirected_receive.c, reads when told to, so each test decides what has arrived before the
receive is posted, and what comes after.  Streams go round the ring, its end included.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import accumulate, islice
from random import Random

import pytest

import vmmc_emu
from vmmc_emu import Cluster
from vmmc_emu._native import lib
from vmmc_emu.paths import native_file

Pattern = Callable[[int], bytes]
PORT = 7000


class Reader:
    """The program on node 0, a connection to it, and what the counters say."""

    def __init__(self, cluster: Cluster, process: subprocess.Popen[bytes]) -> None:
        self.cluster = cluster
        self.process = process
        cluster.node(0).wait_for_port(PORT)
        self.before = cluster.node(0).counters()
        self.connection = cluster.node(0).connect(PORT)

    def counted(self, name: str) -> int:
        """How much a counter of node 0 has grown since the connection was made."""
        return self.cluster.node(0).counters()[name] - self.before[name]

    def until(self, name: str, value: int) -> None:
        """Waits until a counter has grown so far."""
        while self.counted(name) < value:
            ended = self.process.poll() is not None
            assert not ended or self.counted(name) >= value, (name, self.counted(name), value)
            os.sched_yield()

    def go(self) -> None:
        """Lets the program make its next receive."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"g")
        self.process.stdin.flush()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The program does nothing in here."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


Reading = Callable[..., AbstractContextManager[Reader]]


@pytest.fixture
def reader(cluster: Cluster, program: Callable[..., str]) -> Reading:
    """Starts the program: `with reader(chunk, rounds) as r`."""

    @contextmanager
    def start(
        chunk: int, rounds: int, *options: str, environment: dict[str, str] | None = None
    ) -> Iterator[Reader]:
        directory = native_file("libvmmc.so").parent
        assignments = [f"{name}={value}" for name, value in (environment or {}).items()]
        path = program("redirected_receive", f"-L{directory}", "-lvmmc", f"-Wl,-rpath,{directory}")
        with cluster.node(0).popen(
            ["env", *assignments, path, str(PORT), str(chunk), str(rounds), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            try:
                yield Reader(cluster, process)
            finally:
                process.kill()

    return start


def result(r: Reader) -> bytes:
    """What the program read."""
    output, errors = r.process.communicate(timeout=30)
    assert r.process.returncode == 0, errors
    return bytes(output)


RING: int = lib.vmmc_layout_size(b"ring")
# Reads of about 10,000 bytes, of which one has the ring's end in its first half, or in its second.
CHUNKS = [next(c for c in range(10_000, 11_000, 2) if RING % c * 2 // c == half) for half in (0, 1)]
across_the_ring = pytest.mark.parametrize("chunk", CHUNKS, ids=["in its first half", "in its second half"])


@across_the_ring
def test_posted_before(reader: Reading, pattern: Pattern, chunk: int) -> None:
    sent, rounds = b"", RING // chunk + 2
    with reader(chunk, rounds) as r:
        for i in range(rounds):
            r.go()
            r.until("redirections_posted", i + 1)
            sent += (data := pattern(chunk))
            r.connection.sendall(data)
            r.until("bytes_redirected", len(sent))
        assert result(r) == sent
        assert (r.counted("bytes_redirected"), r.counted("bytes_default")) == (len(sent), 0)
        assert r.counted("bytes_copied") == 0
        assert r.counted("redirections_cancelled") == 0


@across_the_ring
def test_posted_after(reader: Reading, pattern: Pattern, chunk: int) -> None:
    sent, rounds = b"", RING // chunk + 2
    with reader(chunk, rounds) as r:
        for _ in range(rounds):
            sent += (data := pattern(chunk))
            r.connection.sendall(data)
            r.until("bytes_default", len(sent))
            r.go()
            r.until("bytes_copied", len(sent))
        assert result(r) == sent
        assert (r.counted("bytes_redirected"), r.counted("bytes_default")) == (0, len(sent))


@across_the_ring
def test_posted_in_the_middle(reader: Reading, pattern: Pattern, chunk: int) -> None:
    sent, half, rounds = b"", chunk // 2, RING // chunk + 2
    with reader(chunk, rounds) as r:
        for i in range(rounds):
            sent += (data := pattern(chunk))
            r.connection.sendall(data[:half])
            r.until("bytes_default", (i + 1) * half)
            r.go()
            r.until("redirections_posted", i + 1)
            r.connection.sendall(data[half:])
            r.until("bytes_redirected", (i + 1) * half)
        assert result(r) == sent
        assert (r.counted("bytes_redirected"), r.counted("bytes_default")) == (len(sent) // 2, len(sent) // 2)
        assert r.counted("bytes_copied") == len(sent) // 2


def test_many_small_messages_into_one(reader: Reading, pattern: Pattern) -> None:
    with reader(20_000, 2) as r:
        sent = pattern(40_000)
        for i in range(2):
            r.go()
            r.until("redirections_posted", i + 1)
            for at in range(20_000 * i, 20_000 * (i + 1), 100):
                r.connection.sendall(sent[at : at + 100])
            r.until("bytes_redirected", 20_000 * (i + 1))
        assert result(r) == sent
        assert (r.counted("bytes_redirected"), r.counted("bytes_default")) == (40_000, 0)


def test_longer_than_the_ring(reader: Reading, pattern: Pattern) -> None:
    sent = pattern(3_000_000)
    with reader(1_000_000, 3) as r:
        for i in range(3):
            r.go()
            r.until("redirections_posted", i + 1)
            r.connection.sendall(sent[1_000_000 * i : 1_000_000 * (i + 1)])
            r.until("bytes_redirected", 1_000_000 * (i + 1))
        assert result(r) == sent
        assert r.counted("bytes_copied") == 0


def test_the_program_is_not_needed_meanwhile(reader: Reading, pattern: Pattern) -> None:
    """What is at its posted address is read: the NIC gives the sender its room back by itself."""
    length, seen = 4 * RING, 3 * RING
    sent = pattern(length)
    with reader(length, 1) as r:
        r.go()
        r.until("redirections_posted", 1)
        with stopped(r.process.pid):
            r.connection.sendall(sent[:seen])
            r.until("bytes_redirected", seen)
        r.connection.sendall(sent[seen:])
        assert result(r) == sent
        assert r.counted("bytes_copied") == 0


@pytest.mark.native
def test_longer_than_the_ring_and_posted_in_the_middle(reader: Reading, pattern: Pattern) -> None:
    length = 3 * RING
    sent = pattern(length)
    with reader(length, 1) as r:
        r.connection.sendall(sent[:1000])
        r.until("bytes_default", 1000)
        r.go()
        r.until("redirections_posted", 1)
        r.connection.sendall(sent[1000:])
        assert result(r) == sent
        assert r.counted("bytes_redirected") + r.counted("bytes_default") == length
        assert r.counted("bytes_copied") == r.counted("bytes_default")


@pytest.mark.native
@pytest.mark.parametrize(("chunk", "rounds"), [(50_000, 100), (RING, 40)])
def test_without_any_order(reader: Reading, pattern: Pattern, chunk: int, rounds: int) -> None:
    sent = pattern(rounds * chunk)
    with reader(chunk, rounds) as r:
        for _ in range(rounds):
            r.go()
        r.connection.sendall(sent)
        assert result(r) == sent
        assert r.counted("bytes_redirected") + r.counted("bytes_default") == len(sent)
        assert r.counted("bytes_copied") == r.counted("bytes_default")


def test_ordinary_memory_is_not_redirected_to(reader: Reading, pattern: Pattern) -> None:
    sent = pattern(300_000)
    with reader(100_000, 3, "ordinary") as r:
        for _ in range(3):
            r.go()
        r.connection.sendall(sent)
        assert result(r) == sent
        assert r.counted("redirections_posted") == 0
        assert r.counted("bytes_copied") == len(sent)


ORDINARY = {"VMMC_REDIRECT_ORDINARY": "1"}


def nic_has_the_memory_of(cluster: Cluster, process: subprocess.Popen[bytes]) -> bool:
    """The NIC of node 0 has been given the memory of the program."""
    nic, memory = cluster.status()["nodes"][0]["nic_pid"], f"/proc/{process.pid}/mem"
    return any(os.readlink(entry.path) == memory for entry in os.scandir(f"/proc/{nic}/fd"))


@across_the_ring
def test_ordinary_memory_when_asked_for(reader: Reading, pattern: Pattern, chunk: int) -> None:
    sent, rounds = b"", RING // chunk + 2
    with reader(chunk, rounds, "ordinary", environment=ORDINARY) as r:
        for i in range(rounds):
            r.go()
            r.until("redirections_posted", i + 1)
            while not nic_has_the_memory_of(r.cluster, r.process):
                os.sched_yield()
            sent += (data := pattern(chunk))
            r.connection.sendall(data)
            r.until("bytes_redirected", len(sent))
        assert result(r) == sent
        assert (r.counted("bytes_default"), r.counted("bytes_copied")) == (0, 0)


@pytest.mark.native
def test_more_ordinary_memory_than_is_posted_at_a_time(reader: Reading, pattern: Pattern) -> None:
    length = 3 * RING + 5
    sent = pattern(2 * length)
    with reader(length, 2, "ordinary", environment=ORDINARY) as r:
        r.go()
        r.go()
        r.connection.sendall(sent)
        assert result(r) == sent
        assert r.counted("redirections_posted") > 0
        assert r.counted("bytes_copied") == r.counted("bytes_default")


def test_ordinary_memory_where_the_kernel_forbids_it(reader: Reading, pattern: Pattern) -> None:
    """A program that is not dumpable keeps its memory: that is no error, and nothing is said."""
    if os.geteuid() == 0:
        pytest.skip("nothing is forbidden to root")
    sent = pattern(100_000)
    with reader(100_000, 1, "ordinary", "undumpable", environment=ORDINARY) as r:
        r.go()
        r.connection.sendall(sent)
        output, errors = r.process.communicate(timeout=30)
        assert (output, errors) == (sent, b"")
        assert r.counted("redirections_posted") == 0


@pytest.mark.native
def test_ordinary_memory_that_cannot_be_written(reader: Reading, pattern: Pattern) -> None:
    """EFAULT, as of any receive: nothing is written past the protection."""
    with reader(100_000, 1, "read-only", environment=ORDINARY) as r:
        r.go()
        r.connection.sendall(pattern(100_000))
        _, errors = r.process.communicate(timeout=30)
        assert b"Bad address" in errors
        assert (r.counted("redirections_posted"), r.counted("bytes_redirected")) == (0, 0)


def test_nonsense_in_the_policy(reader: Reading, pattern: Pattern) -> None:
    sent = pattern(100_000)
    with reader(100_000, 1, "ordinary", environment={"VMMC_REDIRECT_ORDINARY": "10 KiB"}) as r:
        r.go()
        r.connection.sendall(sent)
        output, errors = r.process.communicate(timeout=30)
        assert output == sent
        assert errors.count(b"\n") == 1
        assert b"VMMC_REDIRECT_ORDINARY=10 KiB is neither a number of bytes nor never" in errors
        assert r.counted("redirections_posted") == 0


def period() -> bytes:
    """interrupted_receive.c's pattern."""
    states = accumulate(range(262_139), lambda state, _: (state * 1664525 + 1013904223) % 2**32, initial=1)
    return bytes(state >> 24 & 127 for state in islice(states, 1, None))


@pytest.mark.native
@pytest.mark.parametrize("nic_dies", [False, True], ids=["", "the NIC dies"])
@pytest.mark.parametrize(
    ("memory", "environment"),
    [("heap", {}), ("ordinary", ORDINARY), ("ordinary", {})],
    ids=["heap", "ordinary memory, redirected to", "ordinary memory"],
)
def test_receives_that_end_in_every_way(
    cluster: Cluster, program: Callable[..., str], memory: str, environment: dict[str, str], nic_dies: bool
) -> None:
    """Signals, longjmp, timeouts, parts and peeks at random moments: no byte is lost, doubled or late."""
    directory = native_file("libvmmc.so").parent
    path = program("interrupted_receive", f"-L{directory}", "-lvmmc", f"-Wl,-rpath,{directory}")
    random = Random(7)
    length = 2_000_000
    repeated = period()
    sent = (repeated * (length // len(repeated) + 1))[:length]
    node = cluster.node(0)
    redirects = memory == "heap" or bool(environment)
    assignments = [f"{name}={value}" for name, value in environment.items()]
    process = node.popen(
        ["env", *assignments, path, str(PORT), str(length), "5", memory, *(["dies"] if nic_dies else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )

    def counted(name: str) -> int:
        return node.counters()[name] - before[name]

    before = node.counters()
    with process:
        node.wait_for_port(PORT)
        deaths = sorted(random.randrange(length) for _ in range(3)) if nic_dies else []
        with node.connect(PORT) as connection:
            while redirects and not counted("redirections_posted"):  # who is fast leaves nothing to wait for
                assert process.poll() is None, process.communicate()
                os.sched_yield()
            at = 0
            while at < length:
                piece = random.choice([1, 1000, 3000, 60_000])
                try:
                    connection.sendall(sent[at : at + piece])
                except OSError:  # it has ended, and says why
                    raise AssertionError(process.communicate()) from None
                at += piece
                while deaths and deaths[0] < at:
                    deaths.pop(0)
                    while not (nic := cluster.status()["nodes"][0]["nic_pid"]):
                        os.sched_yield()
                    with suppress(ProcessLookupError):  # not yet known to be dead
                        os.kill(nic, signal.SIGKILL)
            connection.shutdown(socket.SHUT_WR)
            output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.startswith(b"ok"), output
    assert bool(counted("redirections_posted")) == redirects


def receive_into_the_heap(port: int, length: int) -> tuple[bytes, int]:
    """On a node, in Python: receives into a view of the endpoint's memory."""
    with vmmc_emu.attach() as here, socket.create_server(("", port)) as listener:
        buffer = here.alloc(length)
        connection, _ = listener.accept()
        with connection:
            got = connection.recv_into(buffer.view, length, socket.MSG_WAITALL)
        return bytes(buffer), got


def test_from_python(cluster: Cluster, pattern: Pattern) -> None:
    message = pattern(100_000)
    receiving = cluster.node(0).submit(receive_into_the_heap, PORT, len(message))
    cluster.node(0).wait_for_port(PORT)
    before = cluster.node(0).counters()
    with cluster.node(0).connect(PORT) as connection:
        while cluster.node(0).counters()["redirections_posted"] == before["redirections_posted"]:
            os.sched_yield()
        connection.sendall(message)
        assert receiving.result(30) == (message, len(message))
    after = cluster.node(0).counters()
    assert after["bytes_redirected"] - before["bytes_redirected"] == len(message)
