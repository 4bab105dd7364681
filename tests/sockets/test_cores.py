"""NICs choose cores (nodes/nic/core.c), and what people chose for them stands."""

from __future__ import annotations

import json
import os
import subprocess

import psutil
import pytest

from vmmc_emu import Cluster
from vmmc_emu.paths import native_file

BENCH = str(native_file("vmmc-bench"))


def play(cluster: Cluster, core: int, seconds: float) -> int:
    """Ping-pong between node0 and node1, both programs on one core: messages there and back."""
    server = cluster.node(1).popen(
        ["taskset", "-c", str(core), BENCH, "server", "0"], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    port = server.stdout.readline().split()[1]
    client = ["taskset", "-c", str(core), BENCH, "latency", "node1", port, "1", str(seconds)]
    said = cluster.node(0).run(client, capture_output=True, text=True, check=True).stdout
    server.kill()
    server.communicate()
    trips: int = json.loads(said)["trips"]
    return trips


@pytest.mark.skipif(os.cpu_count() == 1, reason="there is one core")
def test_a_nic_that_moves_may_go_anywhere_afterwards(two_nodes: Cluster) -> None:
    """Programs that drive it from core to core leave no mark on it."""
    nics = [psutil.Process(node["nic_pid"]) for node in two_nodes.status()["nodes"]]
    allowed = [nic.cpu_affinity() for nic in nics]
    for core in sorted(os.sched_getaffinity(0))[:2] * 2:
        assert play(two_nodes, core, 0.2) > 0
    assert [nic.cpu_affinity() for nic in nics] == allowed


def test_a_nic_stays_on_the_core_that_somebody_gave_it(two_nodes: Cluster) -> None:
    """With the programs that it serves on the same one: slower, and all the same."""
    core = min(os.sched_getaffinity(0))
    nics = [psutil.Process(node["nic_pid"]) for node in two_nodes.status()["nodes"]]
    allowed = [nic.cpu_affinity() for nic in nics]
    for nic in nics:
        nic.cpu_affinity([core])
    try:
        assert play(two_nodes, core, 0.2) > 0
        assert [nic.cpu_affinity() for nic in nics] == [[core], [core]]
        assert {nic.cpu_num() for nic in nics} == {core}
    finally:
        for nic, cores in zip(nics, allowed, strict=True):
            nic.cpu_affinity(cores)
