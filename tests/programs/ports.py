"""Who may have a port while connections that were accepted there live on: prints what bind and listen say."""

from __future__ import annotations

import errno
import itertools
import socket
import struct
from collections.abc import Callable


def told(call: Callable[[], object]) -> str:
    """`ok`, or the error's name."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def fresh(reuse: int, share: int) -> socket.socket:
    """A socket with SO_REUSEADDR and SO_REUSEPORT as said."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share)
    return sock


def two_that_share() -> None:
    """Both are bound; the first to listen has it."""
    first, second = fresh(1, 0), fresh(1, 0)
    first.bind(("127.0.0.1", 0))
    bound = told(lambda: second.bind(first.getsockname()))
    print("two bound:", bound, told(first.listen), told(second.listen))
    first.close()
    print("the other is closed:", told(second.listen))
    second.close()


def after_the_listener(reuse_before: int, reuse: int, address: str, share: int) -> None:
    """A listener is closed and its connection lives on, or is reset; others want the port."""
    listener = fresh(reuse_before, share)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port))
    accepted, _ = listener.accept()
    listener.close()
    with fresh(reuse, share) as other:
        lives = [told(lambda: other.bind((address, port))), told(other.listen)]
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    accepted.close()
    with fresh(reuse, share) as other:
        is_reset = [told(lambda: other.bind((address, port))), told(lambda: client.recv(1))]
    client.close()
    print(reuse_before, reuse, address, share, "lives:", *lives, "reset:", *is_reset)


two_that_share()
for case in itertools.product((0, 1), (0, 1), ("127.0.0.1", "0.0.0.0"), (0, 1)):
    after_the_listener(*case)
