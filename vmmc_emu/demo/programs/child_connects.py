"""Has a connection, forks; the child opens a connection of its own; then the parent goes on with its own.

child_connects.py HOST PORT
"""

import errno
import os
import socket
import sys

address = (sys.argv[1], int(sys.argv[2]))


def exchange(connection: socket.socket, text: str) -> str:
    """Sends a line and returns what comes back."""
    connection.sendall(text.encode() + b"\n")
    return connection.recv(4096).decode().strip()


def connected() -> socket.socket:
    """A new connection, past the greeting."""
    connection = socket.create_connection(address, timeout=10)
    connection.recv(4096)
    return connection


parents = connected()
child = os.fork()
if child == 0:
    try:
        parents.send(b"x")
    except OSError as error:
        print(f"child, parent's socket: {errno.errorcode[error.errno or 0]}", flush=True)
    parents.close()  # succeeds, and changes nothing for the parent
    print("child, own socket:", exchange(connected(), "from the child"), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent, own socket:", exchange(parents, "from the parent"), flush=True)
