"""The same echo server with a thread for each connection.

echo_threads.py PORT
"""

import socket
import sys
import threading


def serve(connection: socket.socket) -> None:
    """Greets, then echoes until the client ends."""
    with connection:
        connection.sendall(b"welcome\n")
        while data := connection.recv(4096):
            connection.sendall(data)


listener = socket.create_server(("", int(sys.argv[1])), backlog=16)
print("listening", flush=True)
while True:
    accepted, _ = listener.accept()
    threading.Thread(target=serve, args=(accepted,), daemon=True).start()
