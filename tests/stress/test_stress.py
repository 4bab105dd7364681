"""Many connections of random sizes and endings, every byte checked, while everything gets in their way.

One round with one seed, or, with VMMC_SOAK_MINUTES (`make soak`), rounds with ever new seeds for so long.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import vmmc_emu
from vmmc_emu import Cluster, wires
from vmmc_emu.paths import native_directory

ROOT = Path(__file__).resolve().parents[2]
SOAK_S = float(os.environ.get("VMMC_SOAK_MINUTES", "0")) * 60
WAYS = ("block", "poll", "select", "level", "edge")  # of waiting
PORT = 7000
TESTS = 13  # that share the time of a soak
TIMEOUT_S = 100

Program = Callable[..., str]


def seeds() -> Iterator[int]:
    """One seed; in a soak, new ones until its time is over (all of its tests share it)."""
    yield 1
    end = time.monotonic() + SOAK_S / TESTS
    while time.monotonic() < end:
        seed = secrets.randbelow(1 << 30)
        print(f"seed {seed}", flush=True)
        yield seed


@contextlib.contextmanager
def server(
    cluster: Cluster, node: int, program: Program, how: str, threads: int = 1, **environment: str
) -> Iterator[None]:
    """A server that has nothing to complain of."""
    process = cluster.node(node).popen(
        [program("stress"), "serve", str(PORT), how, str(threads)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.communicate()


def load(
    cluster: Cluster, node: int, program: Program, how: str, seed: int, count: int, at_once: int,
    targets: list[int], **environment: str,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Exchanges with the servers of these nodes."""
    names = [f"node{target}" for target in targets]
    command = [program("stress"), "load", how, str(seed), str(count), str(at_once), str(PORT), *names]
    return cluster.node(node).run(command, env=environment, timeout=TIMEOUT_S)


def loads(cluster: Cluster, program: Program, seed: int, count: int, targets: list[int]) -> None:
    """A load of each kind, from every node in turn, all at once."""
    nodes = len(cluster)
    with ThreadPoolExecutor(len(WAYS)) as pool:
        running = [
            pool.submit(load, cluster, (seed + i) % nodes, program, how, seed * 10 + i, count, 8, targets)
            for i, how in enumerate(WAYS)
        ]
        for done in running:
            result = done.result()
            assert (result.returncode, result.stderr) == (0, "")
            assert result.stdout.startswith(f"{count} exchanges")


def only_listeners(cluster: Cluster) -> bool:
    """True once no connection is left on any node."""
    return all(socket.state == "LISTEN" for socket in cluster.sockets())


def shared_memory(cluster: Cluster) -> int:
    """Bytes that the cluster's segments occupy."""
    return sum(os.stat(f"/dev/shm/{name}").st_blocks * 512 for name in cluster.place.segments())


def until(condition: Callable[[], bool]) -> None:
    """Waits for what is to come."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def hogs(count: int = 2) -> Iterator[None]:
    """Programs that want a core each."""
    command = [sys.executable, "-c", "import time\nend = time.time() + 20\nwhile time.time() < end: pass"]
    running = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.native
def test_every_way_of_waiting(eight_nodes: Cluster, program: Program) -> None:
    """Servers and loads that wait in every way, all to all."""
    for seed in seeds():
        with contextlib.ExitStack() as stack:
            for node, how in enumerate(WAYS):
                stack.enter_context(server(eight_nodes, node, program, how, 3 if how == "block" else 1))
            if SOAK_S and seed % 2:
                stack.enter_context(hogs())
            loads(eight_nodes, program, seed, 80 if seed == 1 else 400, list(range(len(WAYS))))
            until(lambda: only_listeners(eight_nodes))


@pytest.mark.native
@pytest.mark.parametrize("restart", ["", "1"], ids=["interrupted", "restarted"])
def test_signals_in_the_middle_of_everything(eight_nodes: Cluster, program: Program, restart: str) -> None:
    """A signal each millisecond at both ends, with SA_RESTART and without."""
    environment = {"STRESS_ALARM_US": "1000"} | ({"STRESS_RESTART": restart} if restart else {})
    for seed in seeds():
        for how in WAYS if SOAK_S else ("block", "poll", "edge"):
            with server(eight_nodes, 3, program, how, 2, **environment):
                result = load(eight_nodes, 4, program, how, seed, 40, 6, [3], **environment)
                assert (result.returncode, result.stderr) == (0, "")


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """What is started meanwhile runs on one core: who is interrupted waits until others have had it."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.native
def test_a_slot_has_its_next_holder_before_the_last_one_is_done(program: Program) -> None:
    """A thread is interrupted in close; another accepts a connection in that slot, and hears of its bytes."""
    for seed in seeds():
        with one_core(), Cluster(nodes=2) as cluster, hogs(1):
            for part in range(8):
                with server(cluster, 0, program, "level", 4):
                    result = load(cluster, 1, program, "level", seed + part, 400, 16, [0], STRESS_SCALE="6")
                    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.native
def test_what_killed_programs_had_sent_arrives(eight_nodes: Cluster, program: Program) -> None:
    """All of it, then the end; and their endpoints are freed."""
    for seed in seeds():
        with server(eight_nodes, 0, program, "level"), ThreadPoolExecutor(4) as pool:
            running = [
                pool.submit(load, eight_nodes, i % 3, program, WAYS[i % len(WAYS)], seed * 100 + i, 1, 1, [0],
                            STRESS_KILL="1")
                for i in range(20)
            ]  # fmt: skip
            assert {done.result().returncode for done in running} == {-signal.SIGKILL}
            # One endpoint is left, the server's: three segments.
            until(lambda: sum(".ep" in name for name in eight_nodes.place.segments()) == 3)


@pytest.mark.native
def test_a_full_backlog_makes_connects_wait(eight_nodes: Cluster, program: Program) -> None:
    """Many more than the backlog connect at once, in both ways of connecting; all of them succeed."""
    for seed in seeds():
        with server(eight_nodes, 5, program, "block", STRESS_BACKLOG="1"), ThreadPoolExecutor(4) as pool:
            running = [
                pool.submit(load, eight_nodes, n, program, how, seed + n, 150, 50, [5], STRESS_SCALE="9")
                for n, how in ((1, "edge"), (2, "block"), (5, "edge"), (6, "block"))
            ]  # fmt: skip
            for done in running:
                assert (done.result().returncode, done.result().stderr) == (0, "")


@pytest.mark.native
def test_churn_leaves_nothing_behind(eight_nodes: Cluster, program: Program) -> None:
    """Thousands of connections later, slots and memory are where they were after the first hundreds."""
    with server(eight_nodes, 0, program, "level"):
        occupied = []
        for seed in seeds():
            for part in range(2):
                result = load(
                    eight_nodes, 1, program, "poll", seed * 2 + part, 1500, 20, [0], STRESS_SCALE="8"
                )
                assert (result.returncode, result.stderr) == (0, "")
                until(lambda: only_listeners(eight_nodes))
                until(lambda: sum(".ep" in name for name in eight_nodes.place.segments()) == 3)
                occupied.append(shared_memory(eight_nodes))
        # The first round had its 20 connections, and the pages of the slots that closing ones hold on to.
        assert max(occupied[1:]) < occupied[0] + (4 << 20)


# ---- NICs that die at any store ----


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native parts, with a NIC that may be killed before each of its stores (tests/native/mortal.c)."""
    directory = tmp_path_factory.mktemp("mortal")
    shutil.copytree(native_directory(), directory / "native")
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-fno-strict-aliasing", "-O1", "-w"]
    compiler = [os.environ.get("CC", "cc"), *flags]

    def compile_one(source: Path) -> str:
        made = directory / f"{source.stem}.o"
        instrument = [] if source.stem == "mortal" else ["-fsanitize=thread", "-fno-builtin-memcpy"]
        command = [*compiler, *instrument, f"-I{ROOT / 'include'}", "-c", str(source), "-o", str(made)]
        subprocess.run(command, check=True)
        return str(made)

    sources = [*sorted((ROOT / "nodes/nic").glob("*.c")), ROOT / "tests/native/mortal.c"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    wrapped = "-Wl,--wrap=memcpy,--wrap=pwrite"
    subprocess.run([*compiler, *objects, wrapped, "-o", str(directory / "native/vmmc-nic")], check=True)
    return directory / "native"


@pytest.fixture
def mortal_cluster(mortal: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int, float], Cluster]:
    """A cluster whose NICs die at any store, for some seconds."""

    def make(nodes: int, seed: int, seconds: float) -> Cluster:
        monkeypatch.setenv("VMMC_NATIVE_DIR", str(mortal))
        monkeypatch.setenv("MORTAL_SEED", str(seed))
        monkeypatch.setenv("MORTAL_LIVES", str(16 + seed % 6))
        monkeypatch.setenv("MORTAL_UNTIL", str(int(time.time() + seconds)))
        return Cluster(nodes=nodes, name=f"test-{secrets.token_hex(6)}")

    return make


@contextlib.contextmanager
def shaken(cluster: Cluster, seed: int, **always: Any) -> Iterator[None]:
    """Wires that become others all the time: faulty, slow, cut, perfect.  always: settings that stay."""
    chance = random.Random(seed)
    choices: dict[str, list[Any]] = {
        "up": [False, True, True],
        "loss": [0.01, 0.05, 0.2],
        "corrupt": [0.01, 0.05],
        "duplicate": [0.02, 0.2],
        "reorder": [0.1, 0.3],
        "delay_ns": [10_000, 1_000_000],
        "rate_bits_per_s": [10**9],
    }
    over = threading.Event()
    nodes = range(len(cluster))

    def shake() -> None:
        while not over.wait(chance.choice([0.02, 0.1, 0.2])):
            names = chance.sample(sorted(choices), chance.choice([0, 1, 2, 4]))
            faults = {name: chance.choice(choices[name]) for name in names}
            ends = chance.sample(nodes, 2)
            change = wires.Change([ends[0]], [ends[1]], {"seed": seed, **faults, **always}, reset=True)
            wires.change(cluster.place, [change])

    with ThreadPoolExecutor(1) as pool:
        shaking = pool.submit(shake)
        try:
            yield
        finally:
            over.set()
            shaking.result()
            wires.change(cluster.place, [wires.Change(nodes, nodes, {}, reset=True)])


@pytest.mark.native
def test_streams_survive_nics_that_die_and_wires_that_are_faulty(
    mortal_cluster: Callable[[int, int, float], Cluster], program: Program
) -> None:
    """No byte is lost or doubled, no connection made twice or forgotten, nothing hangs."""
    for seed in seeds():
        seconds = 3 if seed == 1 else 10
        end = time.monotonic() + seconds
        with mortal_cluster(4, seed, seconds) as cluster, contextlib.ExitStack() as stack:
            for node, how in enumerate(("block", "level", "edge")):
                stack.enter_context(server(cluster, node, program, how, 3 if how == "block" else 1))
            # On a busy machine the time may be over before anything has begun.
            while time.monotonic() < end or not any(
                each["packets_resent"] for each in cluster.counters().values()
            ):
                with shaken(cluster, seed):
                    loads(cluster, program, seed, 40, [0, 1, 2])
                until(lambda: only_listeners(cluster))
            assert "a successor starts" in cluster.logs()


def echo(port: int) -> None:
    """Sends back what comes, on every connection; runs on a node."""

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    with socket.create_server(("", port), backlog=64) as listener:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()


def ask(host: str, port: int, seed: int, seconds: float) -> list[str]:
    """Has bytes sent back, one connection after the other; how each ended; runs on a node."""
    chance = random.Random(seed)
    ends: list[str] = []
    end = time.monotonic() + seconds

    def send(connection: socket.socket, data: bytes) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)

    while not ends or time.monotonic() < end:
        data, found = chance.randbytes(chance.choice([1, 1000, 200_000])), b""
        try:
            with socket.create_connection((host, port)) as connection:
                sender = threading.Thread(target=send, args=(connection, data))
                sender.start()
                try:
                    while part := connection.recv(1 << 16):
                        found += part
                finally:
                    sender.join()
            ends.append("whole" if found == data else "short")
        except OSError as error:
            ends.append(f"error {error.errno}")
        assert data.startswith(found)
    return ends


@pytest.mark.native
def test_peers_are_given_up_again_and_again(
    mortal_cluster: Callable[[int, int, float], Cluster],
) -> None:
    """No wrong byte and no end too early, nothing hangs or is left, and afterwards everything works."""
    for seed in seeds():
        seconds = 2 if seed == 1 else 10
        with mortal_cluster(3, seed, seconds) as cluster:
            for node in cluster.nodes:
                node.submit(echo, PORT)
            for node in cluster.nodes:
                node.wait_for_port(PORT)
            ways = [(a, b) for a in range(3) for b in range(3) if a != b]
            with shaken(cluster, seed, unreachable_ns=50_000_000):
                asking = [
                    cluster.node(a).submit(ask, f"node{b}", PORT, seed * 10 + a * 3 + b, seconds)
                    for a, b in ways
                ]
                ends = {each for call in asking for each in call.result(TIMEOUT_S)}
            assert "short" not in ends

            def all_answer(ways: list[tuple[int, int]] = ways, seed: int = seed) -> bool:
                asking = [cluster.node(a).submit(ask, f"node{b}", PORT, seed, 0) for a, b in ways]
                return [call.result(TIMEOUT_S) for call in asking] == [["whole"]] * len(ways)

            until(all_answer)  # not at once: NICs hear a moment later that their wires are perfect
            until(lambda: only_listeners(cluster))


@pytest.mark.native
def test_streams_survive_nics_that_die_at_any_store(
    mortal_cluster: Callable[[int, int, float], Cluster], program: Program
) -> None:
    """No byte is lost or doubled, no connection made twice or forgotten, nothing hangs."""
    for seed in seeds():
        seconds = 3 if seed == 1 else 10
        end = time.monotonic() + seconds
        with mortal_cluster(4, seed, seconds) as cluster, contextlib.ExitStack() as stack:
            for node, how in enumerate(("block", "level", "edge")):
                stack.enter_context(server(cluster, node, program, how, 3 if how == "block" else 1))
            while time.monotonic() < end:
                loads(cluster, program, seed, 60, [0, 1, 2])
                until(lambda: only_listeners(cluster))
            assert "a successor starts" in cluster.logs()


@pytest.mark.native
@pytest.mark.parametrize(
    ("victim", "how"), [(1, []), (1, ["ordinary"]), (1, ["impatient"]), (0, []), (0, ["impatient"])]
)
def test_each_step_of_copying_and_acknowledging_may_be_the_last(
    mortal: Path, monkeypatch: pytest.MonkeyPatch, program: Program, tmp_path: Path,
    victim: int, how: list[str],
) -> None:  # fmt: skip
    """The receiver's (node1), or the sender's, NIC dies after each in turn; redirections are posted meanwhile
    and, by who is impatient, cancelled."""
    chunk, rounds, most = 100_000, 200, 1000 if SOAK_S else 150
    turns = tmp_path / "turns"
    turns.write_bytes(bytes(8))
    monkeypatch.setenv("VMMC_NATIVE_DIR", str(mortal))
    monkeypatch.setenv("VMMC_RESTART_AT_ONCE", "1")
    monkeypatch.setenv("MORTAL_TURNS", str(turns))
    monkeypatch.setenv("MORTAL_NIC", f"vmmc-nic{victim}")
    monkeypatch.setenv("MORTAL_MOST", str(most))
    flags = [f"-L{mortal}", "-lvmmc", f"-Wl,-rpath,{mortal}"]

    def send(number: int, length: int) -> None:
        with socket.create_connection(("node1", PORT)) as connection:
            connection.sendall(random.Random(number).randbytes(length))

    with Cluster(nodes=2, name=f"test-{secrets.token_hex(6)}") as cluster:
        for number in range(most):  # each run has many of them, how many is chance
            receiver = cluster.node(1).popen(
                [program("redirected_receive", *flags), str(PORT), str(chunk), str(rounds), *how],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            cluster.node(1).wait_for_port(PORT)
            sender = cluster.node(0).submit(send, number, chunk * rounds)
            got, errors = receiver.communicate(b"g" * rounds, timeout=TIMEOUT_S)
            assert (receiver.returncode, errors) == (0, b"")
            assert got == random.Random(number).randbytes(chunk * rounds)
            sender.result(timeout=TIMEOUT_S)
            if int.from_bytes(turns.read_bytes(), "little") > most:
                break
            until(lambda: not [s for s in cluster.node(1).sockets() if s.state == "LISTEN"])
        assert int.from_bytes(turns.read_bytes(), "little") > most
        assert cluster.status()["nodes"][victim]["restarts"]["nic"]["count"] == most


def test_sends_survive_nics_that_die_at_any_store(
    mortal_cluster: Callable[[int, int, float], Cluster],
) -> None:
    """Each send arrives, in order, and is told once, whoever died between the two."""
    page, places, timeout_ms = 4096, 64, TIMEOUT_S * 1000
    for seed in seeds():
        chance = random.Random(seed)
        seconds = 3 if seed == 1 else 10
        end = time.monotonic() + seconds + 1
        with (
            mortal_cluster(2, seed, seconds) as cluster,
            vmmc_emu.attach(0, cluster=cluster.name) as here,
            vmmc_emu.attach(1, cluster=cluster.name) as there,
        ):
            export = there.export(there.alloc(places * page), "places")
            target = here.import_(1, "places", timeout_ms=timeout_ms)
            source = here.alloc(places * page)
            tag = 0
            while time.monotonic() < end:
                expected, transfers = [], []
                for place in range(chance.randrange(1, places)):
                    length = chance.randrange(1, page)
                    block = source[place * page : place * page + length]
                    block[:] = chance.randbytes(length)
                    transfers.append(target.post_send(block, place * page, notify=True, tag=tag))
                    expected.append((place * page, length, tag))
                    tag += 1
                for transfer in transfers:
                    transfer.wait(timeout_ms)
                for offset, length, number in expected:
                    notice = export.notification(timeout_ms)
                    assert (notice.offset, notice.length, notice.tag) == (offset, length, number)
                    assert export.memory[offset : offset + length] == source[offset : offset + length]
                with pytest.raises(TimeoutError):
                    export.notification(timeout_ms=0)
            assert export.arrived().sends == tag
            assert "a successor starts" in cluster.logs()
