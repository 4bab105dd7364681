"""A server that forks to do something else (to save, say) goes on with its connections: prints how they end.

Run over the kernel and on a node, the two transcripts must be equal.
"""

import os
import select
import socket

listener = socket.create_server(("127.0.0.1", 0))
for used in ("read", "written"):
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    client.sendall(b"more than is read")
    select.select([server], [], [])
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    print(used, server.recv(4) if used == "read" else server.send(b"answer"))
    server.close()  # with unread bytes
    try:
        while piece := client.recv(99):
            print(piece)
        print("end of file")
    except OSError as error:
        print(type(error).__name__)
    client.close()
