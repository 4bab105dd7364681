"""Everything is killed or stopped all the time, at random, while programs exchange bytes and check them.

Thirty seconds with one seed, and then, with VMMC_SOAK_MINUTES (`make soak`), rounds with ever new seeds.
VMMC_STRESS_SEED repeats the decisions of a seed; how they meet what goes on is the machine's.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

import vmmc_emu
from vmmc_emu import Cluster, ClusterError, processes
from vmmc_emu.processes import DAEMON, NIC, SUPERVISOR, Process

SOAK_S = float(os.environ.get("VMMC_SOAK_MINUTES", "0")) * 60
ROUND_S = 30.0
NODES = 8
UNLUCKY = 7  # the node that loses its power
WAYS = ("block", "poll", "select", "level", "edge")  # of waiting
PORT, MORTAL_PORT = 7100, 7101
TIMEOUT_S = 90.0

Compiled = Callable[..., str]


@dataclass
class Chaos:
    """A cluster in which things die."""

    cluster: Cluster
    program: Compiled
    seed: int
    end: float
    failures: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    running: list[subprocess.Popen[str]] = field(default_factory=list)  # programs that may be stopped
    victims: list[subprocess.Popen[str]] = field(default_factory=list)  # and those that may be killed
    lock: threading.Lock = field(default_factory=threading.Lock)

    def goes_on(self) -> bool:
        return time.monotonic() < self.end and not self.failures

    def start(
        self, node: int, *arguments: object, victim: bool = False, **environment: str
    ) -> subprocess.Popen[str]:
        """A stress program on a node; it leaves the cores to those who drive it."""
        process = self.cluster.node(node).popen(
            ["nice", "-n", "10", self.program("stress"), *map(str, arguments)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with self.lock:
            (self.victims if victim else self.running).append(process)
        return process

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        try:
            _, errors = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return 1, "hangs"
        else:
            if f"cannot use sockets of node{UNLUCKY}" in errors:  # no power any more when it attached
                return -signal.SIGKILL, ""
        finally:
            with self.lock:
                for known in (self.running, self.victims):
                    if process in known:
                        known.remove(process)
        return process.returncode, errors

    # ---- traffic ----

    def serve(self, node: int, how: str, stop: threading.Event) -> None:
        """A server that nobody kills."""
        process = self.start(node, "serve", PORT, how, 2 if how == "block" else 1)
        stop.wait()
        process.send_signal(signal.SIGTERM)
        found = self.finish(process)
        if found != (0, ""):
            self.failures.append(f"server {how} on node{node}: {found}")

    def serve_mortally(self, node: int, how: str, stop: threading.Event) -> None:
        """A server that is killed, and started again."""
        while not stop.is_set():
            try:
                status, errors = self.finish(self.start(node, "serve", MORTAL_PORT, how, victim=True))
            except ClusterError:  # the node is off
                time.sleep(0.01)
                continue
            # At the end it is asked to end, perhaps before it has come to say how it does.
            if errors or status not in (0, -signal.SIGKILL, *([-signal.SIGTERM] if stop.is_set() else [])):
                self.failures.append(f"mortal server {how} on node{node}: {(status, errors)}")
                return
            self.done["servers killed"] += 1

    def load(self, number: int, *, victim: bool = False, tolerant: bool = False) -> None:
        """One load after another, each from another node."""
        chance = random.Random(self.seed * 1000 + number)
        while self.goes_on():
            port = MORTAL_PORT if tolerant else PORT
            targets = range(5, NODES) if tolerant else range(len(WAYS))
            environment = {"STRESS_SCALE": "16"}
            if victim:
                environment["STRESS_VICTIM"] = "1"
            if tolerant:
                environment["STRESS_TOLERANT"] = "1"
            node = chance.randrange(NODES if victim else UNLUCKY)
            with contextlib.suppress(ClusterError):  # the node is off
                self.load_from(node, number, chance, port, targets, environment, victim=victim)
            self.done["victims" if victim else "tolerant loads" if tolerant else "loads"] += 1

    def load_from(
        self, node: int, number: int, chance: random.Random, port: int, targets: range,
        environment: dict[str, str], *, victim: bool,
    ) -> None:  # fmt: skip
        process = self.start(
            node, "load", chance.choice(WAYS), chance.randrange(1 << 30), 200, 6, port,
            *(f"node{target}" for target in targets), victim=victim, **environment,
        )  # fmt: skip
        status, errors = self.finish(process)
        if errors or status not in ((0, -signal.SIGKILL) if victim else (0,)):
            self.failures.append(f"load {number}: {(status, errors)}")

    def send(self) -> None:
        """VMMC sends with notifications, each arriving once and in order."""
        chance = random.Random(self.seed)
        page, places, tag = 4096, 16, 0
        try:
            with (
                vmmc_emu.attach(5, cluster=self.cluster.name) as here,
                vmmc_emu.attach(6, cluster=self.cluster.name) as there,
            ):
                export = there.export(there.alloc(places * page), "chaos")
                target = here.import_(6, "chaos", timeout_ms=20_000)
                source = here.alloc(places * page)
                while self.goes_on():
                    expected, transfers = [], []
                    for place in range(chance.randrange(1, places)):
                        block = source[place * page : place * page + chance.randrange(1, page)]
                        block[:] = chance.randbytes(len(block))
                        transfers.append(target.post_send(block, place * page, notify=True, tag=tag))
                        expected.append((place * page, len(block), tag))
                        tag += 1
                    for transfer in transfers:
                        transfer.wait(30_000)
                    for offset, length, number in expected:
                        notice = export.notification(30_000)
                        if (notice.offset, notice.length, notice.tag) != (offset, length, number):
                            raise AssertionError(f"{notice} instead of {(offset, length, number)}")
                        if export.memory[offset : offset + length] != source[offset : offset + length]:
                            raise AssertionError(f"bytes of send {number} differ")
                    time.sleep(0.01)  # others want to talk, too
                if export.arrived().sends != tag:
                    raise AssertionError(f"{export.arrived().sends} sends arrived of {tag}")
        except Exception as error:
            self.failures.append(f"sends: {type(error).__name__}: {error}")
        self.done["sends"] += tag

    # ---- trouble ----

    def signal(self, process: Process, number: signal.Signals) -> None:
        descriptor = processes.open_pidfd(process)
        if descriptor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
            os.close(descriptor)

    def recorded(self, kind: str) -> list[Process]:
        return processes.recorded(self.cluster.place, kind)

    def wait_for_daemons(self) -> None:
        """Until a supervisor has all of them again: to kill both at once is another matter."""
        log = self.cluster.place.logs / "supervisor.log"
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            # What supervisors said since the newest began; the first has forked all daemons itself.
            *before, since = log.read_text(errors="replace").split(" takes over from one")
            joined = {line.split()[2] for line in since.splitlines() if line.endswith("has joined")}
            whole = len(joined) == (NODES if before else 0) and len(before) == self.done["kill supervisor"]
            if whole and self.recorded(SUPERVISOR) and len(self.recorded(DAEMON)) == NODES:
                return
            time.sleep(0.02)
        self.failures.append("not all daemons have a supervisor")

    def trouble(self, chance: random.Random) -> None:
        """One event."""
        what = chance.choices(
            ["kill NIC", "stop NIC", "kill daemon", "stop daemon", "kill supervisor", "stop supervisor",
             "kill program", "stop program", "kill node"],
            [8, 4, 3, 2, 1, 1, 8, 4, 2],
        )[0]  # fmt: skip
        verb, whom = what.split()
        number = signal.SIGKILL if verb == "kill" else signal.SIGSTOP
        pause_s = chance.uniform(0.01, 0.2)
        choice = chance.random()
        if whom == "program":
            with self.lock:
                known = self.victims if verb == "kill" else self.running + self.victims
                if not known:
                    return
                process = known[int(choice * len(known))]
                process.send_signal(number)
            self.done[what] += 1
            if verb == "stop":
                time.sleep(pause_s)
                process.send_signal(signal.SIGCONT)
            return
        if number is signal.SIGKILL and whom in ("daemon", "supervisor", "node"):
            self.wait_for_daemons()
        if whom == "node":
            self.done[what] += 1
            self.cluster.node(UNLUCKY).kill()
            time.sleep(pause_s)
            self.cluster.node(UNLUCKY).start()
            return
        found = self.recorded({"NIC": NIC, "daemon": DAEMON, "supervisor": SUPERVISOR}[whom])
        if not found:
            return
        target = found[int(choice * len(found))]
        self.done[what] += 1
        self.signal(target, number)
        if verb == "stop":
            time.sleep(pause_s)
            self.signal(target, signal.SIGCONT)

    def run(self) -> None:
        """Until the end, or until something is wrong."""
        stop = threading.Event()
        threads = [threading.Thread(target=self.serve, args=(n, how, stop)) for n, how in enumerate(WAYS)]
        threads += [
            threading.Thread(target=self.serve_mortally, args=(n, WAYS[n - 4], stop)) for n in range(5, NODES)
        ]
        for node in range(NODES):
            threads[node].start()
            self.cluster.node(node).wait_for_port(PORT if node < len(WAYS) else MORTAL_PORT, timeout=30)
        loads = [threading.Thread(target=self.load, args=(number,)) for number in range(2)]
        loads.append(threading.Thread(target=self.load, args=(10,), kwargs={"victim": True}))
        loads.append(threading.Thread(target=self.load, args=(11,), kwargs={"tolerant": True}))
        loads.append(threading.Thread(target=self.send))
        for thread in loads:
            thread.start()
        chance = random.Random(self.seed)
        while self.goes_on():
            time.sleep(chance.uniform(0.05, 0.35))
            self.trouble(chance)
        for thread in loads:
            thread.join()
        stop.set()
        while any(thread.is_alive() for thread in threads):
            with self.lock:
                for process in self.victims:
                    process.send_signal(signal.SIGTERM)
            time.sleep(0.02)


def until(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


def one_round(program: Compiled, seed: int, seconds: float) -> None:
    with Cluster(nodes=NODES, name=f"test-{secrets.token_hex(6)}") as cluster:
        chaos = Chaos(cluster, program, seed, time.monotonic() + seconds)
        chaos.run()
        logs = [line for line in cluster.logs().splitlines() if " info " not in line]
        assert chaos.failures == [], "\n".join([f"VMMC_STRESS_SEED={seed}", *chaos.failures, *logs])
        print(f"seed {seed}: {dict(sorted(chaos.done.items()))}", flush=True)
        # All is as if nothing had been: everybody is there, nothing is left of who is not.
        chaos.wait_for_daemons()
        until(lambda: cluster.status()["state"] == "up", cluster.logs)
        until(lambda: not [s for s in cluster.place.segments() if ".ep" in s], cluster.logs)
        assert cluster.sockets() == []
        assert chaos.failures == []
        assert chaos.done["loads"] > 0
        assert chaos.done["sends"] > 0


@pytest.mark.timeout(0 if SOAK_S else 600)
@pytest.mark.native
def test_everything_dies_all_the_time(program: Compiled) -> None:
    """No byte is lost or doubled, nobody hangs, nothing is left behind."""
    given = os.environ.get("VMMC_STRESS_SEED")
    one_round(program, int(given or 1), ROUND_S)
    end = time.monotonic() + SOAK_S
    while time.monotonic() < end and not given:
        one_round(program, secrets.randbelow(1 << 30), ROUND_S)
