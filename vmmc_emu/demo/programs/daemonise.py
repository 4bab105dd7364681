"""An echo server that goes into the background, before or after it opens its socket.

daemonise.py before|after PORT LOG
"""

import errno
import os
import socket
import sys

order, port, log = sys.argv[1], int(sys.argv[2]), sys.argv[3]


def go_into_the_background() -> None:
    """The classic: fork, a session of its own, fork again."""
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)


def listen() -> socket.socket:
    """A listening socket on the port."""
    return socket.create_server(("", port))


if order == "after":
    listener = listen()
    go_into_the_background()
else:
    go_into_the_background()
    listener = listen()
try:
    connection, _ = listener.accept()
    connection.sendall(b"welcome\n")
    connection.sendall(connection.recv(4096))
    said = "served"
except OSError as error:
    said = f"accept: {errno.errorcode[error.errno or 0]}"
with open(log, "w") as file:
    print(said, file=file)
