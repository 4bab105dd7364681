"""An echo server that forks a child for each connection, as servers have done since 1983.

echo_fork.py PORT
"""

import errno
import os
import socket
import sys

listener = socket.create_server(("", int(sys.argv[1])), backlog=16)
print("listening", flush=True)
while True:
    connection, peer = listener.accept()
    child = os.fork()
    if child == 0:
        try:
            connection.sendall(b"welcome\n")
            while data := connection.recv(4096):
                connection.sendall(data)
        except OSError as error:
            print(f"child: {errno.errorcode[error.errno or 0]}: {error.strerror}", flush=True)
            os._exit(1)
        os._exit(0)
    connection.close()  # the parent's copy: in a kernel-level network the child has its own
    os.waitpid(child, 0)
