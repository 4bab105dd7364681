"""The channel between a daemon and the supervisor: what must outlive a daemon is told to the supervisor.

A successor daemon is a fork of the supervisor, so it has all of it without a word: the descriptors by
inheritance, the rest as Python objects.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import select
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from vmmc_emu.loop import Callback, Loop


@dataclass
class Endpoint:
    """One process's attachment to a node."""

    serial: int
    index: int
    pid: int
    attach: int  # descriptors: the socket on which it attached,
    pidfd: int  # the process,
    # And what the NIC may write to wake its threads; -1: it was lost, since there were no descriptors.
    wakers: dict[int, int] = field(default_factory=dict)
    replied: bool = False  # it has been given its segments
    ending: bool = False  # its process is gone; the NIC delivers what it left

    def descriptors(self) -> set[int]:
        """Those that there are."""
        return {self.attach, self.pidfd, *self.wakers.values()} - {-1}

    def add_waker(self, number: int, descriptors: list[int]) -> bool:
        """Takes what came for a waker: one descriptor, or none; False: none."""
        before, found = self.wakers.get(number, -1), descriptors[0] if descriptors else -1
        if before >= 0:
            os.close(before)
        self.wakers[number] = found
        return found >= 0

    def waker(self, number: int) -> tuple[int, ...]:
        """The descriptor of a waker as it is sent on: one, or none."""
        found = self.wakers[number]
        return (found,) if found >= 0 else ()

    def close(self) -> None:
        """Lets go of its descriptors."""
        for descriptor in self.descriptors():
            os.close(descriptor)


@dataclass
class Store:
    """What is known of a node that its next daemon will need."""

    node: int
    listener: int  # descriptors: where programs attach; made once, so that none is refused in between
    control: int  # the daemon's and
    nic_control: int  # the NIC's end of their socket pair
    endpoints: dict[int, Endpoint] = field(default_factory=dict)  # by serial
    last_serial: int = 0
    nic_pid: int = 0  # 0: none has been started
    boot: int = 1  # how often the node was started

    def descriptors(self) -> set[int]:
        """Everything that a daemon of this node needs open."""
        found = {self.listener, self.control, self.nic_control}
        for endpoint in self.endpoints.values():
            found |= endpoint.descriptors()
        return found

    def close(self) -> None:
        """Lets go of all of them."""
        for descriptor in self.descriptors():
            os.close(descriptor)


class Outbox:
    """Messages for a socket that does not block: what finds no room, its reader being stopped, waits."""

    def __init__(self, loop: Loop, connection: socket.socket, readable: Callback) -> None:
        connection.setblocking(False)
        self._loop, self._connection, self._readable = loop, connection, readable
        self._waiting: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._loop.watch(connection.fileno(), readable)

    def send(self, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
        """Sends now or as soon as there is room; what waits holds descriptors of its own.

        Where these cannot be had it goes without them, as if its reader had no room for them.
        """
        if not self._waiting:
            with contextlib.suppress(OSError):  # whatever it is, flush meets it again
                socket.send_fds(self._connection, [data], descriptors)
                return
        held: list[int] = []
        try:
            for descriptor in descriptors:
                held.append(os.dup(descriptor))
        except OSError:
            while held:
                os.close(held.pop())
        self._waiting.append((data, tuple(held)))
        self.flush()

    def tell(self, descriptors: tuple[int, ...] = (), **message: Any) -> None:
        """The same with a message as `receive` takes it."""
        self.send(json.dumps(message).encode(), descriptors)

    def flush(self) -> None:
        """Sends what there is room for."""
        while self._waiting:
            data, descriptors = self._waiting[0]
            try:
                socket.send_fds(self._connection, [data], descriptors)
            except BlockingIOError:
                break
            except (BrokenPipeError, ConnectionResetError, ConnectionRefusedError):
                self.clear()  # there is nobody to tell; who reads from it hears so
                return
            except OSError as error:
                if error.errno not in {errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM}:
                    raise
                self._loop.call_later(_NO_ROOM_S, self._flush_open)  # descriptors under way, or memory
                return
            self._waiting.popleft()
            for descriptor in descriptors:
                os.close(descriptor)
        self._loop.watch(self._connection.fileno(), self._readable, self.flush if self._waiting else None)

    def _flush_open(self) -> None:
        if self._connection.fileno() >= 0:
            self.flush()

    def clear(self) -> None:
        """Forgets what waits."""
        while self._waiting:
            for descriptor in self._waiting.popleft()[1]:
                os.close(descriptor)
        if self._connection.fileno() >= 0:
            self._loop.watch(self._connection.fileno(), self._readable)

    def close(self) -> None:
        """Closes the socket and forgets what waits."""
        self.clear()
        self._loop.unwatch(self._connection.fileno())
        self._connection.close()


_NO_ROOM_S = 0.1


def send(channel: socket.socket, descriptors: tuple[int, ...] = (), **message: Any) -> None:
    """Sends one message; when the other side is gone, or does not read, there is nobody to tell."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
        socket.send_fds(channel, [json.dumps(message).encode()], descriptors)


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message with its descriptors; None: the other side is gone.

    BlockingIOError: nothing yet.  ValueError: what came is no message; its descriptors are closed.
    """
    try:
        data, descriptors = receive_descriptors(channel, 65536)
    except ConnectionResetError:
        return None
    if not data:
        return None
    try:
        message = _message(data)
    except ValueError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return message, descriptors


def _message(data: bytes) -> dict[str, Any]:
    try:
        message = json.loads(data)
        if not isinstance(message, dict):
            raise ValueError("a message is an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{data[:60]!r} is no message: {error}") from None
    return message


def opened(message: dict[str, Any], descriptors: list[int], most: int) -> dict[str, Any]:
    """The message itself, where what came says that it is in the file that came along (`enclosed`).

    That descriptor is closed and taken from the list.  ValueError: it is no message, or larger than `most`.
    """
    if message.get("enclosed") is not True:
        return message
    file = descriptors.pop(0)
    try:
        size = os.fstat(file).st_size
        if size > most:
            raise ValueError(f"it has {size} bytes, more than {most}")
        return _message(os.pread(file, size, 0))
    finally:
        os.close(file)


def has_hung_up(connection: socket.socket) -> bool:
    """Whether the other end is closed: what it asked for before, nobody waits for."""
    look = select.poll()
    look.register(connection, select.POLLRDHUP)
    return bool(look.poll(0))


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as they were when it connected."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def receive_descriptors(connection: socket.socket, most: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """A message and the descriptors that came with it, close-on-exec.

    (socket.recv_fds ignores its flags, so that what it receives would be inherited across exec.)
    """
    data, ancillary, _, _ = connection.recvmsg(
        most, socket.CMSG_SPACE(8 * struct.calcsize("i")), flags | socket.MSG_CMSG_CLOEXEC
    )
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) // descriptors.itemsize * descriptors.itemsize])
    return data, list(descriptors)
