"""Echoes what each client sends, a thread a client.  Says "listening PORT".

echo_server.py [PORT]
"""

import socket
import sys
import threading


def serve(connection: socket.socket) -> None:
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)


listener = socket.create_server(("", int(sys.argv[1]) if len(sys.argv) > 1 else 0), backlog=64)
print("listening", listener.getsockname()[1], flush=True)
while True:
    accepted, _ = listener.accept()
    threading.Thread(target=serve, args=(accepted,), daemon=True).start()
