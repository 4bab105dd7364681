"""Who may touch what: everything that was not exported to a node, for that access, is out of reach."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

import pytest

import vmmc_emu
from vmmc_emu import Cluster, Endpoint
from vmmc_emu._native import ffi, lib
from vmmc_emu.vmmc import READ, WRITE

Attach = Callable[..., Endpoint]

PAGE = 4096
TIMEOUT_MS = 20_000


def test_no_import_without_an_export(ends: tuple[Endpoint, Endpoint]) -> None:
    with pytest.raises(FileNotFoundError, match="no such export"):
        ends[1].import_(0, "nothing", timeout_ms=TIMEOUT_MS)
    for number in (0, 5, 2**32 - 1):
        with pytest.raises(FileNotFoundError):
            ends[1].import_(0, number, timeout_ms=TIMEOUT_MS)


def test_no_send_without_an_import(ends: tuple[Endpoint, Endpoint], cluster: Cluster) -> None:
    receiver, sender = ends
    buffer = receiver.alloc(PAGE)
    receiver.export(buffer, "buffer")
    target = sender.import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    before = cluster.node(1).counters()["commands_rejected"]
    source = sender.alloc(PAGE)
    source[:4] = b"evil"
    for number in (target.id + 1, 1023, 1024, 2**32 - 1):
        target.id, honest = number, target.id
        with pytest.raises(PermissionError):
            target.send(source, timeout_ms=TIMEOUT_MS)
        target.id = honest
    assert bytes(buffer) == bytes(PAGE)
    assert cluster.node(1).counters()["commands_rejected"] == before + 4


def test_an_export_for_one_node_is_not_for_another(vmmc_cluster: Callable[..., Cluster]) -> None:
    cluster = vmmc_cluster(nodes=3)
    with (
        vmmc_emu.attach(0, cluster.name) as receiver,
        vmmc_emu.attach(1, cluster.name) as chosen,
        vmmc_emu.attach(2, cluster.name) as other,
    ):
        export = receiver.export(receiver.alloc(PAGE), "for node1", node=1)
        chosen.import_(0, "for node1", timeout_ms=TIMEOUT_MS).send(chosen.alloc(1), timeout_ms=TIMEOUT_MS)
        for name in ("for node1", export.number):
            with pytest.raises(PermissionError, match="not exported to this node"):
                other.import_(0, name, timeout_ms=TIMEOUT_MS)
        assert export.arrived().sends == 1


def test_an_import_is_of_use_to_its_endpoint_alone(ends: tuple[Endpoint, Endpoint], attach: Attach) -> None:
    ends[0].export(ends[0].alloc(PAGE), "buffer")
    target = ends[1].import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    neighbour = attach(1)
    source = neighbour.alloc(1)
    sent = lib.vmmc_send(
        neighbour._attachment.pointer, target.id, ffi.from_buffer(source.view), 1, 0, 0, 0, TIMEOUT_MS
    )
    assert (sent, os.strerror(ffi.errno)) == (-1, "Operation not permitted")


def test_permissions(ends: tuple[Endpoint, Endpoint]) -> None:
    receiver, sender = ends
    for name, permissions in (("write", WRITE), ("read", READ)):
        receiver.export(receiver.alloc(PAGE), name, permissions=permissions)
    memory = sender.alloc(8)
    write, read = (sender.import_(0, name, timeout_ms=TIMEOUT_MS) for name in ("write", "read"))
    write.send(memory, timeout_ms=TIMEOUT_MS)
    read.fetch(memory, timeout_ms=TIMEOUT_MS)
    with pytest.raises(PermissionError):
        write.fetch(memory, timeout_ms=TIMEOUT_MS)
    with pytest.raises(PermissionError):
        read.send(memory, timeout_ms=TIMEOUT_MS)


@pytest.mark.parametrize("permissions", [0, 4, WRITE | 8])
def test_permissions_that_do_not_exist(ends: tuple[Endpoint, Endpoint], permissions: int) -> None:
    with pytest.raises(OSError, match="argument"):
        ends[0].export(ends[0].alloc(PAGE), "buffer", permissions=permissions)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 5001), (5000, 1), (4999, 2), (2**64 - 1, 1), (2**64 - 1, 2), (2**64 - 4096, 4097), (2**63, 2**12)],
)
@pytest.mark.parametrize("pin_bytes", [None, 2 * PAGE])  # in one piece, and cut into many
def test_outside_the_bounds(attach: Attach, offset: int, length: int, pin_bytes: int | None) -> None:
    receiver, sender = attach(0), attach(1, pin_bytes)
    around = receiver.alloc(3 * PAGE)
    receiver.export(around[:5000], "buffer", permissions=READ | WRITE)
    target = sender.import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    memory = sender.alloc(length)
    memory[:] = b"x" * length
    for transfer in (target.post_send, target.post_fetch):
        with pytest.raises(OSError, match="not in the exported buffer"):
            transfer(memory, offset).wait(TIMEOUT_MS)
    assert bytes(around) == bytes(3 * PAGE)
    assert bytes(memory) == b"x" * length


def test_after_unexport(ends: tuple[Endpoint, Endpoint]) -> None:
    receiver, sender = ends
    buffer, memory = receiver.alloc(PAGE), sender.alloc(PAGE)
    memory[:] = b"y" * PAGE
    export = receiver.export(buffer, "buffer", permissions=READ | WRITE)
    target = sender.import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    export.unexport()
    for transfer in (target.send, target.fetch):
        with pytest.raises(ConnectionResetError, match="unexported"):
            transfer(memory, timeout_ms=TIMEOUT_MS)
    with pytest.raises(FileNotFoundError):
        sender.import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    # The same place of the table exported anew is another export.
    again = receiver.export(buffer, "buffer")
    assert again.id == export.id
    with pytest.raises(ConnectionResetError):
        target.send(memory, timeout_ms=TIMEOUT_MS)
    assert bytes(buffer) == bytes(PAGE)
    with pytest.raises(OSError, match="argument"):
        lib_unexport_twice(receiver, again.id)


def lib_unexport_twice(endpoint: Endpoint, export_id: int) -> None:
    """Unexports twice, by number, as a confused program would."""
    pointer = endpoint._attachment.pointer
    assert lib.vmmc_unexport(pointer, export_id) == 0
    if lib.vmmc_unexport(pointer, export_id) < 0:
        raise OSError(ffi.errno, os.strerror(ffi.errno))


def test_after_unimport(ends: tuple[Endpoint, Endpoint]) -> None:
    ends[0].export(ends[0].alloc(PAGE), "buffer")
    target = ends[1].import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    target.unimport()
    with pytest.raises(PermissionError):
        target.send(ends[1].alloc(1), timeout_ms=TIMEOUT_MS)


def test_after_the_exporter_has_gone(ends: tuple[Endpoint, Endpoint]) -> None:
    receiver, sender = ends
    receiver.export(receiver.alloc(PAGE), "buffer")
    target = sender.import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    receiver.detach()
    memory = sender.alloc(1)

    def send_on() -> None:
        while True:  # the daemon hears of it a moment later
            target.send(memory, timeout_ms=TIMEOUT_MS)

    with pytest.raises(ConnectionResetError):
        send_on()


def test_names(ends: tuple[Endpoint, Endpoint], attach: Attach) -> None:
    receiver, neighbour = ends[0], attach(0)
    longest = "n" * 32
    receiver.export(receiver.alloc(1), longest)
    assert ends[1].import_(0, longest, timeout_ms=TIMEOUT_MS).length == 1
    with pytest.raises(FileNotFoundError):
        ends[1].import_(0, "n" * 31, timeout_ms=TIMEOUT_MS)
    for endpoint in (receiver, neighbour):  # names are the node's
        with pytest.raises(FileExistsError):
            endpoint.export(endpoint.alloc(1), longest)
    ends[1].export(ends[1].alloc(1), longest)  # another node's are its own
    for bad in ("", "n" * 33):
        with pytest.raises(OSError, match="argument"):
            receiver.export(receiver.alloc(1), bad)


def test_nodes_that_do_not_exist(ends: tuple[Endpoint, Endpoint], attach: Attach, cluster: Cluster) -> None:
    with pytest.raises(OSError, match="no such node"):
        ends[0].import_(7, "buffer", timeout_ms=TIMEOUT_MS)
    with pytest.raises(OSError, match="no such node"):
        ends[0].export(ends[0].alloc(1), "buffer", node=7)
    with pytest.raises(OSError, match="no such node"):
        vmmc_emu.attach(2, cluster.name)
    with pytest.raises(FileNotFoundError, match="not up"):
        vmmc_emu.attach(0, "no-such-cluster")
    with pytest.raises(OSError, match="does not run on a node"):
        vmmc_emu.attach()


def test_memory_that_is_not_the_endpoints(ends: tuple[Endpoint, Endpoint]) -> None:
    receiver, sender = ends
    export = receiver.export(receiver.alloc(PAGE), "buffer")
    target = sender.import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    ordinary = memoryview(bytearray(100))
    for call in (
        lambda: target.send(ordinary),
        lambda: target.send(receiver.alloc(100)),  # another endpoint's
        lambda: sender.export(ordinary, "ordinary"),
        lambda: export.redirect(ordinary),
    ):
        with pytest.raises(OSError, match="alloc"):
            call()


def test_memory_that_was_freed(ends: tuple[Endpoint, Endpoint]) -> None:
    receiver, sender = ends
    receiver.export(receiver.alloc(PAGE), "buffer")
    target = sender.import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    pointer = sender._attachment.pointer
    memory = lib.vmmc_alloc(pointer, 3 * PAGE)
    assert lib.vmmc_free(pointer, memory) == 0
    assert lib.vmmc_send(pointer, target.id, memory, 1, 0, 0, 0, TIMEOUT_MS) == -1
    assert os.strerror(ffi.errno) == "Bad address"


def test_a_detached_endpoint(ends: tuple[Endpoint, Endpoint]) -> None:
    receiver, sender = ends
    export = receiver.export(receiver.alloc(PAGE), "buffer")
    errors = []

    def wait() -> None:
        try:
            export.notification()
        except OSError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    memory = receiver.alloc(PAGE)
    memory[:3] = b"abc"
    receiver.detach()
    waiting.join(TIMEOUT_MS / 1000)
    assert [type(error) for error in errors] == [ConnectionResetError]
    with pytest.raises(ConnectionResetError):
        receiver.alloc(1)
    assert bytes(memory[:3]) == b"abc"  # views outlive the endpoint
    sender.detach()
    sender.detach()


def test_a_child_of_fork_has_no_endpoint(ends: tuple[Endpoint, Endpoint]) -> None:
    receiver, sender = ends
    receiver.export(receiver.alloc(PAGE), "buffer")
    target = sender.import_(0, "buffer", timeout_ms=TIMEOUT_MS)
    child = os.fork()
    if child == 0:
        try:
            sender.alloc(1)
        except OSError as error:
            os._exit(42 if "attach anew" in str(error) else 1)
        finally:
            sys.stdout.flush()
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    target.send(sender.alloc(1), timeout_ms=TIMEOUT_MS)
