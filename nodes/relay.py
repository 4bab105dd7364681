"""The relay: runs on a node and joins sockets of the outside with connections inside.

    python -m vmmc_emu.nodes.relay publish PORT PID    standard input: a socket that listens on the host
    python -m vmmc_emu.nodes.relay connect             standard input: requests, each with a socket

It is an ordinary program under the preload library.  Its own sockets to the node are VMMC's; those that
it inherits or is given are the kernel's and stay so.  `publish` ends with the process PID; `connect` with
whoever holds the other end of its standard input.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading

from vmmc_emu.nodes.channel import receive_descriptors
from vmmc_emu.nodes.title import set_title

from vmmc_emu.names import node_address, node_address6, node_index

_CHUNK_BYTES = 256 * 1024
_STACK_BYTES = 256 * 1024
_FULL_MS = 100
_DRAIN_S = 2.0


def own_addresses() -> list[str]:
    """Where a program of this node may listen: its own addresses, and its loopback."""
    node = node_index(os.environ["VMMC_NODE"], int(os.environ["VMMC_NODES"]))
    return [node_address(node), "127.0.0.1", node_address6(node), "::1"]


def connect_here(port: int) -> socket.socket:
    """Connects to a port of this node, whatever address a program listens on."""
    first: OSError | None = None
    for address in own_addresses():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.connect((address, port))
        except OSError as error:
            connection.close()
            if first is None:
                first = error
            if error.errno != errno.ECONNREFUSED:
                break
            continue
        return connection
    assert first is not None
    raise first


class Pair:
    """Two sockets, each of whose input goes to the other's output; half-close and reset go along."""

    def __init__(self, outside: socket.socket, inside: socket.socket) -> None:
        self._sockets = (outside, inside)
        self._open_directions = 2
        self._broken = False
        self._lock = threading.Lock()

    def run(self) -> None:
        """Moves bytes until both directions have ended."""
        outside, inside = self._sockets
        other = threading.Thread(target=self._pump, args=(outside, inside), daemon=True)
        other.start()
        self._pump(inside, outside)
        other.join()
        for each in self._sockets:
            if self._broken:
                with contextlib.suppress(OSError):  # the peer is to see a reset, not an orderly end
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.close()

    def _pump(self, source: socket.socket, destination: socket.socket) -> None:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        try:
            while count := source.recv_into(buffer):
                destination.sendall(buffer[:count])
        except OSError:
            self._broken = True
            for each in self._sockets:  # wakes the other direction
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            return
        with contextlib.suppress(OSError):
            destination.shutdown(socket.SHUT_WR)


class Relay:
    """Counts the pairs that still move bytes."""

    def __init__(self) -> None:
        self._active: set[threading.Thread] = set()

    def start(self, outside: socket.socket, inside: socket.socket) -> None:
        """Joins two sockets in threads of their own."""
        thread = threading.Thread(target=Pair(outside, inside).run, daemon=True)
        self._active = {each for each in self._active if each.is_alive()} | {thread}
        thread.start()

    def drain(self) -> None:
        """Waits a little for what is still on its way."""
        for thread in self._active:
            thread.join(_DRAIN_S)


def publish(port: int, pid: int) -> None:
    """Serves a listening socket of the host until the process ends."""
    relay = Relay()
    # Two descriptors a client: as many as there may be.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    listener = socket.socket(fileno=0)
    listener.setblocking(False)
    try:
        program = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(program, select.POLLIN)
    poll.register(listener, select.POLLIN)
    full = False  # no descriptors or memory for another one: it stays in the queue until somebody hangs up
    while True:
        ready = {descriptor for descriptor, _ in poll.poll(_FULL_MS if full else None)}
        if full:
            poll.modify(listener, select.POLLIN)
            full = False
        if listener.fileno() in ready:
            try:
                outside, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                    raise
                poll.modify(listener, 0)
                full = True
            else:
                outside.setblocking(True)
                threading.Thread(target=_join_published, args=(relay, outside, port), daemon=True).start()
        if program in ready:
            listener.close()
            relay.drain()
            return


def _join_published(relay: Relay, outside: socket.socket, port: int) -> None:
    try:
        inside = connect_here(port)
    except OSError as error:
        print(
            f"vmmc-emu: published port: nothing takes port {port} on this node: {error.strerror}",
            file=sys.stderr,
        )
        # A reset: what the client would get if it connected to the port itself.
        outside.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        outside.close()
        return
    with contextlib.suppress(OSError):
        outside.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    relay.start(outside, inside)


def connect() -> None:
    """Joins sockets that come on standard input with connections to ports that the messages name."""
    relay = Relay()
    requests = socket.socket(fileno=0)
    while True:
        data, descriptors = receive_descriptors(requests, 4096)
        if not data:
            return  # whoever held our sockets' other ends is gone
        outside, answer = (socket.socket(fileno=descriptor) for descriptor in descriptors)
        port = int(json.loads(data)["port"])
        threading.Thread(target=_join_connected, args=(relay, outside, answer, port), daemon=True).start()


def _join_connected(relay: Relay, outside: socket.socket, answer: socket.socket, port: int) -> None:
    with answer:
        try:
            inside = connect_here(port)
        except OSError as error:
            outside.close()
            with contextlib.suppress(OSError):
                answer.send(json.dumps({"errno": error.errno}).encode())
            return
        relay.start(outside, inside)
        with contextlib.suppress(OSError):
            answer.send(json.dumps({"errno": 0}).encode())


def main(arguments: list[str]) -> int:
    """Runs the relay."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.stack_size(_STACK_BYTES)
    match arguments:
        case ["publish", port, pid]:
            set_title(f"vmmc-emu: relay to port {port} of pid {pid}", "vmmc relay")
            publish(int(port), int(pid))
        case ["connect"]:
            set_title("vmmc-emu: relay for connections", "vmmc relay")
            connect()
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
