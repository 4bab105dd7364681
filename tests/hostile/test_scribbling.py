"""Programs that write anything, at any time, into the memory that they share with their NIC.

For a few seconds, or, with VMMC_FUZZ_MINUTES (`make fuzz`), with ever new seeds for so long.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from vmmc_emu import Cluster

MINUTES = float(os.environ.get("VMMC_FUZZ_MINUTES", "0"))
SECONDS = MINUTES * 60 / 3 if MINUTES else 20 if os.environ.get("CI") else 6
SCRIBBLE_MS = 700
PORT = 7000
TIMEOUT_S = 100

Program = Callable[..., str]
EchoServer = Callable[..., int]


def nics(cluster: Cluster) -> list[int | None]:
    """The NIC processes: a new one means that one has died."""
    return [node["nic_pid"] for node in cluster.status()["nodes"]]


def until(condition: Callable[[], bool], why: Callable[[], object]) -> None:
    """Waits for what is to come."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, why()
        time.sleep(0.01)


def endpoints(cluster: Cluster) -> int:
    """Programs whose memory is there."""
    return sum(name.endswith(".own") for name in cluster.place.segments())


@pytest.mark.native
@pytest.mark.timeout(0)
def test_they_harm_nobody(two_nodes: Cluster, program: Program, echo_server: EchoServer) -> None:
    """NICs live, honest streams between and on the same nodes have every byte, nothing stays behind."""
    scribbler, stress = program("scribble"), program("stress")
    served = echo_server(two_nodes, 1)
    before = nics(two_nodes)
    end = time.monotonic() + SECONDS
    scribbled = 0

    def scribble(number: int) -> int:
        generator = random.Random(secrets.randbelow(1 << 30) if MINUTES else number)
        done = 0
        while time.monotonic() < end:
            command = [scribbler, str(generator.randrange(1 << 30)), str(SCRIBBLE_MS)]
            result = two_nodes.node(number).run([*command, "node1", str(served)], timeout=TIMEOUT_S)
            # It may die of what it does to itself; before that it has to have come so far.
            assert result.stdout == "scribbling\n", (result, two_nodes.logs())
            done += 1
        return done

    def load(how: str, node: int) -> int:
        done = 0
        while not done or time.monotonic() < end:
            arguments = ["load", how, str(node * 1000 + done), "20", "4", str(PORT), "node1", "node0"]
            result = two_nodes.node(node).run([stress, *arguments], timeout=TIMEOUT_S)
            assert (result.returncode, result.stderr) == (0, ""), two_nodes.logs()
            done += 1
        return done

    servers = [
        two_nodes.node(i).popen(
            [stress, "serve", str(PORT), "level"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        for server in servers:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
        with ThreadPoolExecutor(4) as pool:
            hostile = [pool.submit(scribble, node) for node in range(2)]
            honest = [pool.submit(load, how, node) for node, how in enumerate(("block", "poll"))]
            scribbled = sum(one.result() for one in hostile)
            assert all(one.result() for one in honest)
        for server in servers:
            server.send_signal(signal.SIGTERM)
            assert server.communicate(timeout=TIMEOUT_S)[1] == ""
            assert server.returncode == 0
    finally:
        for server in servers:
            server.kill()
            server.communicate()
    assert nics(two_nodes) == before, two_nodes.logs()
    until(lambda: endpoints(two_nodes) == 1, two_nodes.logs)  # the echo server's
    # At most: a kind of nonsense, and that it was detached.
    said = re.findall(r"(?:warning|error) nic node\d+: endpoint .*", two_nodes.logs())
    assert len(said) <= 2 * scribbled, said
