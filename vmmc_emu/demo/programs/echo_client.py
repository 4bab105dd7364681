"""Connects, reads the greeting, sends a line, prints what comes back.

echo_client.py HOST PORT TEXT
"""

import socket
import sys

host, port, text = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with socket.create_connection((host, port), timeout=10) as connection, connection.makefile("r") as lines:
    if not lines.readline():
        print("the server ended the connection")
        sys.exit(3)
    connection.sendall(text.encode() + b"\n")
    print(lines.readline().strip() or "the server ended the connection")
