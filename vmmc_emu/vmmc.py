"""VMMC for Python: one-sided transfers between the nodes of a cluster.

    import vmmc_emu

    with vmmc_emu.attach(node=0) as receiver, vmmc_emu.attach(node=1) as sender:
        inbox = receiver.export(receiver.alloc(4096), "inbox")

        letter = sender.alloc(4096)
        letter[:5] = b"hello"
        sender.import_(0, "inbox").send(letter[:5], notify=True)

        notice = inbox.notification()
        print(bytes(inbox.memory[notice.offset : notice.offset + notice.length]))

Memory of `Endpoint.alloc` lies in the endpoint's segment, where the NICs read and write it: slices of it
are views, and nothing here copies.  A send names what is to be sent by such a slice.  Everything that can
go wrong is an OSError with the errno that vmmc.h documents, hence PermissionError, TimeoutError,
ConnectionResetError, FileNotFoundError and FileExistsError where these fit.  Timeouts are in milliseconds;
None waits for ever.  All methods may be called from any thread.
"""

from __future__ import annotations

import atexit
import errno
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vmmc_emu._native import ffi, lib
from vmmc_emu.names import default_cluster

__all__ = [
    "READ",
    "WRITE",
    "Arrived",
    "Buffer",
    "Endpoint",
    "Export",
    "Import",
    "Notice",
    "Pinned",
    "Redirected",
    "Redirection",
    "Transfer",
    "attach",
]

READ: int = lib.VMMC_READ
WRITE: int = lib.VMMC_WRITE

# What an errno of libvmmc's means to a person; vmmc.h says the same to programmers.
_MEANINGS = {
    errno.EINVAL: "the range is not in the exported buffer, or an argument makes no sense",
    errno.EFAULT: "the memory is not what this endpoint's alloc() gave: allocate it there",
    errno.EPERM: "the buffer is not exported to this node, not for this kind of access, or not imported",
    errno.ENOMEM: "no room: in the heap, in /dev/shm, or within the bound of pinned memory (VMMC_PIN_BYTES)",
    errno.ENOENT: "there is no such export",
    errno.EEXIST: "the node has an export of that name already",
    errno.EBUSY: "it is in use",
    errno.EAGAIN: "too many transfers are under way: wait for some",
    errno.EHOSTUNREACH: "the cluster has no such node, or it is off",
    errno.ECONNRESET: "the buffer was unexported, or the endpoint has ended",
    errno.ENETDOWN: "the NIC serves this program no more, or its node is gone: a line on stderr says why",
    errno.ECONNREFUSED: "the node's daemon does not answer: is the cluster up? `vmmc-emu status` tells more",
    errno.ENOTCONN: "this program does not run on a node: name one, or start it with vmmc-emu run",
    errno.ENOBUFS: "the data is in place, but nobody takes the receiver's notifications: its ring is full",
    errno.ETIMEDOUT: "it lasted longer than timeout_ms",
    errno.EBADF: "the endpoint belongs to this process's parent: attach anew after a fork",
}


def _error(what: str, number: int, meaning: str | None = None) -> OSError:
    """The OSError (of the subclass that fits) for an errno."""
    return OSError(number, f"{what}: {meaning or _MEANINGS.get(number) or os.strerror(number)}")


def _check(result: int, what: str) -> int:
    """A result of libvmmc's, or its error raised."""
    if result < 0:
        raise _error(what, ffi.errno)
    return result


def _patient(call: Callable[[int], int], timeout_ms: int | None, what: str) -> None:
    """Makes a call that waits: goes on after signals whose Python handlers did not raise (PEP 475)."""
    deadline = None if timeout_ms is None else time.monotonic() + timeout_ms / 1000
    left = -1 if timeout_ms is None else max(timeout_ms, 0)
    while call(left) < 0:
        if ffi.errno != errno.EINTR:
            raise _error(what, ffi.errno)
        if deadline is not None:
            left = max(int((deadline - time.monotonic()) * 1000), 0)


class _Attachment:
    """The C endpoint, kept mapped as long as a view of its heap lives."""

    def __init__(self, cluster: str | None, node: int | None) -> None:
        self.shared = node is None
        self.ended = False
        self._lock = threading.Lock()
        self._unfreed: list[Any] = []  # memory that a forgotten transfer may still be using
        name = ffi.NULL if cluster is None else cluster.encode()
        self.pointer = lib.vmmc_attach(name, lib.VMMC_HERE if node is None else node)
        if not self.pointer:
            number = ffi.errno
            which = cluster or default_cluster()
            where = "to this program's node" if node is None else f"to node{node} of cluster {which!r}"
            meaning = None
            if number == errno.ENOENT:
                meaning = f"it is not up: start it with vmmc-emu --cluster {which} up"
            raise _error(f"cannot attach {where}", number, meaning)
        _attachments.add(self)

    def end(self) -> None:
        """Ends the endpoint; its memory stays mapped."""
        with self._lock:
            if self.ended:
                return
            self.ended = True
        _check(lib.vmmc_end(self.pointer), "cannot end the endpoint")

    def free(self, memory: Any) -> None:
        """Gives memory back, now or when nothing uses it any more."""
        if self.ended and not self.shared:
            return
        with self._lock:
            waiting, self._unfreed = [*self._unfreed, memory], []
        still = [m for m in waiting if lib.vmmc_free(self.pointer, m) < 0 and ffi.errno == errno.EBUSY]
        with self._lock:
            self._unfreed += still

    def __del__(self) -> None:
        # The endpoint that sockets use stays attached until the process ends.
        if getattr(self, "pointer", None) and not self.shared:
            lib.vmmc_detach(self.pointer)


_attachments: weakref.WeakSet[_Attachment] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Before the interpreter goes: no handler may be called after that."""
    for attachment in list(_attachments):
        try:
            attachment.end()
        except OSError:
            continue  # a child of fork: the endpoint is its parent's


class Buffer:
    """Memory of an endpoint's heap: zeroed, page-aligned, committed.

    Slices are memoryviews on the segment.  The memory is given back when the last view of it is gone.
    """

    def __init__(self, endpoint: Endpoint, length: int) -> None:
        """Use `Endpoint.alloc`."""
        attachment = endpoint._attachment
        pointer = lib.vmmc_alloc(attachment.pointer, length)
        if not pointer:
            raise _error(f"cannot allocate {length} bytes", ffi.errno)
        owned = ffi.gc(ffi.cast("char *", pointer), attachment.free)
        self.view: memoryview = memoryview(ffi.buffer(owned, length))
        """All of it."""

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, key: slice) -> memoryview:
        return self.view[key]

    def __setitem__(self, key: slice, value: bytes | bytearray | memoryview) -> None:
        self.view[key] = value

    def __bytes__(self) -> bytes:
        return bytes(self.view)


Memory = Buffer | memoryview


def _view(memory: Memory) -> memoryview:
    """The bytes of a buffer or of a view of one."""
    view = memory.view if isinstance(memory, Buffer) else memory
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _address(view: memoryview) -> Any:
    return ffi.from_buffer("char[]", view)


@dataclass(frozen=True)
class Notice:
    """A notification: what arrived, and whose send it was."""

    offset: int
    """in the exported buffer"""
    length: int
    node: int
    """the sender's"""
    tag: int
    """what the sender said"""
    sender: int
    """serial of the sender's endpoint"""


@dataclass(frozen=True)
class Arrived:
    """What has arrived in an export, wherever it was put."""

    bytes: int
    sends: int


@dataclass(frozen=True)
class Redirected:
    """Which bytes went to the destination: offsets [start, stop) of the exported buffer, and no others."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Pinned:
    """What an endpoint's UTLB holds."""

    limit_bytes: int
    pinned_bytes: int
    in_use_bytes: int
    pins: int
    unpins: int


class Transfer:
    """A send or fetch under way."""

    def __init__(self, attachment: _Attachment, number: int, view: memoryview, what: str) -> None:
        """Use `Import.post_send` or `Import.post_fetch`."""
        self._attachment = attachment
        self._number = number
        self._view: memoryview | None = view  # the memory must live as long as the NIC may use it
        self._what = what

    def wait(self, timeout_ms: int | None = None) -> None:
        """Returns when the bytes are in place.  After TimeoutError it goes on and can be waited for again."""
        if self._view is None:
            return
        try:
            _patient(
                lambda left: lib.vmmc_wait(self._attachment.pointer, self._number, left),
                timeout_ms,
                self._what,
            )
        except TimeoutError:
            raise
        except OSError:
            self._view = None
            raise
        self._view = None

    def done(self) -> bool:
        """True when it is complete; raises its error if it has failed."""
        try:
            self.wait(timeout_ms=0)
        except TimeoutError:
            return False
        return True

    def forget(self) -> None:
        """Says that nobody will wait for it."""
        if self._view is not None:
            lib.vmmc_forget(self._attachment.pointer, self._number)
            self._view = None

    def __del__(self) -> None:
        self.forget()


class Import:
    """A buffer of another process: send into it, or fetch from it."""

    def __init__(self, endpoint: Endpoint, imported: Any, what: str) -> None:
        """Use `Endpoint.import_`."""
        self._attachment = endpoint._attachment
        self.id: int = imported.id
        self.node: int = imported.node
        self.length: int = imported.length
        self.permissions: int = imported.permissions
        self._what = what

    def post_send(
        self, source: Memory, remote_offset: int = 0, *, notify: bool = False, tag: int = 0
    ) -> Transfer:
        """Begins to send `source` to [remote_offset, …) of the buffer, and returns at once."""
        view = _view(source)
        what = f"cannot send {len(view)} bytes to offset {remote_offset} of {self._what}"
        flags = lib.VMMC_NOTIFY if notify else 0
        number = lib.vmmc_post_send(
            self._attachment.pointer, self.id, _address(view), len(view), remote_offset, flags, tag
        )
        return Transfer(self._attachment, _check(number, what), view, what)

    def post_fetch(self, destination: Memory, remote_offset: int = 0) -> Transfer:
        """Begins to fill `destination` from [remote_offset, …) of the buffer, and returns at once."""
        view = _view(destination)
        what = f"cannot fetch {len(view)} bytes from offset {remote_offset} of {self._what}"
        number = lib.vmmc_post_fetch(
            self._attachment.pointer, self.id, _address(view), len(view), remote_offset
        )
        return Transfer(self._attachment, _check(number, what), view, what)

    def send(
        self,
        source: Memory,
        remote_offset: int = 0,
        *,
        notify: bool = False,
        tag: int = 0,
        timeout_ms: int | None = None,
    ) -> None:
        """Sends `source` and returns when it is in place; after TimeoutError it may yet arrive."""
        self.post_send(source, remote_offset, notify=notify, tag=tag).wait(timeout_ms)

    def fetch(self, destination: Memory, remote_offset: int = 0, *, timeout_ms: int | None = None) -> None:
        """Fills `destination` from the buffer."""
        self.post_fetch(destination, remote_offset).wait(timeout_ms)

    def unimport(self) -> None:
        """Gives the import up: sends and fetches through it fail from now on."""
        _check(lib.vmmc_unimport(self._attachment.pointer, self.id), f"cannot unimport {self._what}")


class Redirection:
    """A posted redirection; leaving a `with` block ends it."""

    def __init__(self, export: Export, destination: memoryview, offset: int) -> None:
        """Use `Export.redirect`."""
        self._export = export
        self._destination = destination
        self._offset = offset
        self._result: Redirected | None = None
        result = lib.vmmc_redirect(
            export._attachment.pointer, export.id, offset, len(destination), _address(destination)
        )
        _check(result, f"cannot redirect [{offset}, {offset + len(destination)}) of {export._what}")

    def wait(self, upto: int | None = None, timeout_ms: int | None = None) -> Redirected:
        """Waits until the run has reached offset `upto`: the end of the destination when left out."""
        goal = self._offset + len(self._destination) if upto is None else upto
        told = ffi.new("struct vmmc_redirected *")
        pointer, number = self._export._attachment.pointer, self._export.id
        _patient(
            lambda left: lib.vmmc_redirect_wait(pointer, number, goal, told, left),
            timeout_ms,
            f"cannot wait for a redirection of {self._export._what}",
        )
        return Redirected(getattr(told, "from"), told.to)

    def end(self) -> Redirected:
        """Ends it and tells, for good, which bytes went to the destination; nothing writes there any more."""
        if self._result is None:
            told = ffi.new("struct vmmc_redirected *")
            result = lib.vmmc_redirect_end(self._export._attachment.pointer, self._export.id, told)
            _check(result, f"cannot end the redirection of {self._export._what}")
            self._result = Redirected(getattr(told, "from"), told.to)
        return self._result

    def __enter__(self) -> Redirection:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Export:
    """A buffer that others may import; leaving a `with` block unexports it."""

    def __init__(
        self, endpoint: Endpoint, memory: Memory, name: str | None, permissions: int, node: int | None
    ) -> None:
        """Use `Endpoint.export`."""
        self._attachment = endpoint._attachment
        self.memory: memoryview = _view(memory)
        """The exported buffer."""
        self.name = name
        self._what = f"export {name!r}" if name is not None else "an export without a name"
        self._callback: Any = None
        self.id: int = _check(
            lib.vmmc_export(
                self._attachment.pointer,
                _address(self.memory),
                len(self.memory),
                ffi.NULL if name is None else name.encode(),
                permissions,
                lib.VMMC_ANYONE if node is None else node,
            ),
            f"cannot export {len(self.memory)} bytes as {name!r}",
        )
        self.number: int = lib.vmmc_export_number(self._attachment.pointer, self.id)
        """By which it can be imported, when it has no name."""

    def unexport(self) -> None:
        """Ends the export: nothing writes into the memory any more; importers get ConnectionResetError."""
        _check(lib.vmmc_unexport(self._attachment.pointer, self.id), f"cannot unexport {self._what}")

    def arrived(self) -> Arrived:
        """How much has arrived so far."""
        told = ffi.new("struct vmmc_arrived *")
        _check(lib.vmmc_arrived(self._attachment.pointer, self.id, told), f"cannot look at {self._what}")
        return Arrived(told.bytes, told.sends)

    def notification(self, timeout_ms: int | None = None) -> Notice:
        """Takes the oldest notification of this export, waiting for one if need be."""
        told = ffi.new("struct vmmc_notice *")
        _patient(
            lambda left: lib.vmmc_notification(self._attachment.pointer, self.id, told, left),
            timeout_ms,
            f"no notification of {self._what}",
        )
        return _notice(told)

    def on_notification(self, handler: Callable[[Notice], None] | None) -> None:
        """Has `handler` called, in a thread of the library, for each notification; None: no more."""
        callback = ffi.NULL
        if handler is not None:
            chosen = handler  # for the closure: it is not None
            callback = ffi.callback("vmmc_handler *", lambda told, _: chosen(_notice(told)))
        result = lib.vmmc_on_notification(self._attachment.pointer, self.id, callback, ffi.NULL)
        _check(result, f"cannot set the handler of {self._what}")
        self._callback = callback  # lives as long as the library may call it

    def redirect(self, destination: Memory, offset: int = 0) -> Redirection:
        """Has bytes sent to [offset, …) go to `destination` instead, as far as it reaches."""
        return Redirection(self, _view(destination), offset)

    def __enter__(self) -> Export:
        return self

    def __exit__(self, *_: object) -> None:
        self.unexport()


def _notice(told: Any) -> Notice:
    return Notice(told.offset, told.length, told.node, told.tag, told.sender)


class Endpoint:
    """This process's attachment to a node; leaving a `with` block ends it."""

    def __init__(self, node: int | None, cluster: str | None) -> None:
        """Use `attach`."""
        self._attachment = _Attachment(cluster, node)
        pointer = self._attachment.pointer
        self.node: int = lib.vmmc_node(pointer)
        self.nodes: int = lib.vmmc_nodes(pointer)
        self.serial: int = lib.vmmc_serial(pointer)

    def alloc(self, length: int) -> Buffer:
        """Memory that can be exported, sent from, fetched to and redirected to."""
        return Buffer(self, length)

    def export(
        self, memory: Memory, name: str | None = None, *, permissions: int = WRITE, node: int | None = None
    ) -> Export:
        """Lets `node` (None: every node) send into (WRITE) or fetch from (READ) the memory, by name."""
        return Export(self, memory, name, permissions, node)

    def import_(self, node: int, name: str | int, *, timeout_ms: int | None = None) -> Import:
        """Imports what a node exports under a name, or under an export's `number`."""
        told = ffi.new("struct vmmc_import *")
        pointer = self._attachment.pointer
        what = f"{name!r} of node{node}"
        if isinstance(name, int):
            number = name
            _patient(
                lambda left: lib.vmmc_import_number(pointer, node, number, told, left),
                timeout_ms,
                f"cannot import export number {what}",
            )
        else:
            text = name.encode()
            _patient(
                lambda left: lib.vmmc_import(pointer, node, text, told, left),
                timeout_ms,
                f"cannot import {what}",
            )
        return Import(self, told, what)

    def pinned(self) -> Pinned:
        """What the UTLB of this endpoint holds."""
        told = ffi.new("struct vmmc_pinned *")
        _check(lib.vmmc_pinned(self._attachment.pointer, told), "cannot look at the UTLB")
        return Pinned(told.limit_bytes, told.pinned_bytes, told.in_use_bytes, told.pins, told.unpins)

    def detach(self) -> None:
        """Ends the endpoint: exports and imports are gone, waiting calls get ConnectionResetError.

        Views of its memory stay valid, but nobody else sees them any more.
        """
        self._attachment.end()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(node: int | None = None, cluster: str | None = None) -> Endpoint:
    """Attaches this process to a node of a running cluster.

    node None: the node that the program runs on (`vmmc-emu run`), with the endpoint that its sockets use.
    cluster None: $VMMC_CLUSTER, or "default".  A process may attach to several nodes at once.
    """
    return Endpoint(node, cluster)
