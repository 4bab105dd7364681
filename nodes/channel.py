"""The channel between a daemon and the supervisor: what must outlive a daemon is told to the supervisor.

A successor daemon is a fork of the supervisor, so it has all of it without a word: the descriptors by
inheritance, the rest as Python objects.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Endpoint:
    """One process's attachment to a node."""

    serial: int
    index: int
    pid: int
    attach: int  # descriptors: the socket on which it attached,
    pidfd: int  # the process,
    wakers: dict[int, int] = field(default_factory=dict)  # and what the NIC may write to wake its threads
    replied: bool = False  # it has been given its segments
    ending: bool = False  # its process is gone; the NIC delivers what it left

    def close(self) -> None:
        """Lets go of its descriptors."""
        for descriptor in (self.attach, self.pidfd, *self.wakers.values()):
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

    def descriptors(self) -> set[int]:
        """Everything that a daemon of this node needs open."""
        found = {self.listener, self.control, self.nic_control}
        for endpoint in self.endpoints.values():
            found |= {endpoint.attach, endpoint.pidfd, *endpoint.wakers.values()}
        return found


def send(channel: socket.socket, descriptors: tuple[int, ...] = (), **message: Any) -> None:
    """Tells the supervisor; when it is gone there is nobody to tell."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        socket.send_fds(channel, [json.dumps(message).encode()], descriptors)


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message with its descriptors; None: the other side is gone.  BlockingIOError: nothing yet."""
    try:
        data, descriptors = receive_descriptors(channel, 65536)
    except ConnectionResetError:
        return None
    return (json.loads(data), descriptors) if data else None


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
