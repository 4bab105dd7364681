"""What an observer sees of a node, and that it bears whatever programs wrote."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from vmmc_emu import Cluster, Endpoint
from vmmc_emu._native import ffi, lib

Attach = Callable[..., Endpoint]

PAGE = 4096
TIMEOUT_MS = 20_000
HEADER = 16384  # bytes at the beginning of an endpoint's segment
SLOTS = 8 << 20  # where its socket slots begin


def endpoints(cluster: Cluster, node: int) -> list[tuple[int, int, str]]:
    """Serial, pid and command of the programs attached to a node."""
    found = ffi.new("struct vmmc_endpoint_info[]", 64)
    count = lib.vmmc_endpoints(cluster.name.encode(), node, found, 64)
    assert count >= 0
    return [(e.serial, e.pid, ffi.string(e.command).decode()) for e in found[0:count]]


def segment(cluster: Cluster, endpoint: Endpoint, part: str) -> Path:
    """The file of a part of an endpoint's memory."""
    return (
        Path("/dev/shm") / f"vmmc.{os.getuid()}.{cluster.name}.node{endpoint.node}.ep{endpoint.serial}.{part}"
    )


def test_nodes(cluster: Cluster, attach: Attach) -> None:
    info = ffi.new("struct vmmc_node_info *")
    assert lib.vmmc_node_info(cluster.name.encode(), 1, info) == 0
    assert (info.node, info.nodes, info.incarnation, info.endpoints) == (1, 2, 1, 0)
    assert Path(f"/proc/{info.nic_pid}/comm").read_text(encoding="ascii").startswith("vmmc-nic")
    attach(1)
    while not info.endpoints:  # the NIC hears of it from the daemon
        assert lib.vmmc_node_info(cluster.name.encode(), 1, info) == 0
    assert info.endpoints == 1


@pytest.mark.parametrize(
    ("name", "node"), [("no-such", 0), ("", 0), ("../x", 0), ("x" * 33, 0), (None, 2), (None, 1 << 20)]
)
def test_what_is_not_there(cluster: Cluster, name: str | None, node: int) -> None:
    text = cluster.name.encode() if name is None else name.encode()
    info = ffi.new("struct vmmc_node_info *")
    for result in (
        lib.vmmc_node_info(text, node, info),
        lib.vmmc_node_counters(text, node, ffi.NULL, 0),
        lib.vmmc_endpoints(text, node, ffi.NULL, 0),
        lib.vmmc_sockets(text, node, ffi.NULL, 0),
    ):
        assert result == -1


def test_endpoints_and_their_counters(cluster: Cluster, attach: Attach) -> None:
    receiver, sender = attach(0), attach(1)
    receiver.export(receiver.alloc(PAGE), "buffer")
    name = Path(Path("/proc/self/cmdline").read_text(encoding="utf-8").split("\0")[0]).name
    assert endpoints(cluster, 0) == [(receiver.serial, os.getpid(), name)]
    target = sender.import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    target.send(sender.alloc(1000), timeout_ms=TIMEOUT_MS)
    found = ffi.new("struct vmmc_counter[]", 100)
    count = lib.vmmc_endpoint_counters(cluster.name.encode(), 1, sender.serial, found, 100)
    counters = {ffi.string(c.name).decode(): c.value for c in found[0:count]}
    assert (counters["sends"], counters["bytes_sent"], counters["utlb_pins"]) == (1, 1000, 1)
    assert lib.vmmc_endpoint_counters(cluster.name.encode(), 1, 999, found, 100) == -1


def test_a_short_array_is_filled_and_the_number_told(cluster: Cluster) -> None:
    found = ffi.new("struct vmmc_counter[]", 100)
    count = lib.vmmc_node_counters(cluster.name.encode(), 0, found, 3)
    assert count > 20
    assert found[2].name != ffi.NULL
    assert found[3].name == ffi.NULL


def test_counters_of_endpoints_that_are_gone_still_count(cluster: Cluster, attach: Attach) -> None:
    sender = attach(1)
    receiver = attach(0)
    receiver.export(receiver.alloc(PAGE), "buffer")
    target = sender.import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    target.send(sender.alloc(5 * PAGE)[:PAGE], timeout_ms=TIMEOUT_MS)
    assert cluster.node(1).counters()["utlb_pins"] == 1
    sender.detach()
    while endpoints(cluster, 1):
        os.sched_yield()
    assert cluster.node(1).counters()["utlb_pins"] == 1


def test_bears_what_a_program_scribbles_over_its_memory(cluster: Cluster, attach: Attach) -> None:
    endpoint = attach(0)
    noise = random.Random(2)
    found = ffi.new("struct vmmc_socket_info[]", 16)
    with segment(cluster, endpoint, "app").open("r+b", buffering=0) as file:
        for _ in range(50):
            # Behind the doorbell and the commands, which the NIC would answer.
            os.pwrite(file.fileno(), noise.randbytes(28), 0)
            os.pwrite(file.fileno(), noise.randbytes(PAGE), SLOTS)
            for _, _, command in endpoints(cluster, 0):
                assert command.isascii()
                assert all(character.isprintable() for character in command)
            assert lib.vmmc_sockets(cluster.name.encode(), 0, found, 16) == 0
            assert len(cluster.node(0).counters()) > 20


def test_bears_a_segment_that_was_cut(cluster: Cluster, attach: Attach) -> None:
    endpoint = attach(0)
    for length in (HEADER // 2, 10, 0):
        os.truncate(segment(cluster, endpoint, "app"), length)
        assert cluster.node(0).counters()["sends"] == 0
        assert endpoints(cluster, 0) in ([], endpoints(cluster, 0))
        assert lib.vmmc_sockets(cluster.name.encode(), 0, ffi.NULL, 0) == 0
    os.truncate(segment(cluster, endpoint, "app"), lib.vmmc_layout_size(b"app"))


def test_observing_commits_no_memory(cluster: Cluster, attach: Attach) -> None:
    endpoint = attach(0)
    parts = [segment(cluster, endpoint, part) for part in ("app", "nic")]
    before = [part.stat().st_blocks for part in parts]
    for _ in range(3):
        lib.vmmc_sockets(cluster.name.encode(), 0, ffi.NULL, 0)
        cluster.node(0).counters()
    assert [part.stat().st_blocks for part in parts] == before


def test_sizes_of_the_layout() -> None:
    assert lib.vmmc_layout_size(b"app") > lib.vmmc_layout_size(b"heap") > 0
    assert lib.vmmc_layout_size(b"pub") % PAGE == 0
    assert lib.vmmc_layout_size(b"nonsense") == 0
