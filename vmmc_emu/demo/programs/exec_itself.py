"""Opens a connection, lets it be inherited, execs itself, and looks what is left of it.

exec_itself.py HOST PORT
"""

import errno
import os
import socket
import sys

if len(sys.argv) == 3:
    connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10)
    connection.recv(4096)
    connection.set_inheritable(True)
    print(f"before exec: descriptor {connection.fileno()} is a socket", flush=True)
    os.execv(sys.executable, [sys.executable, __file__, str(connection.fileno())])
try:
    os.fstat(int(sys.argv[1]))
    print(f"after exec: descriptor {sys.argv[1]} is open")
except OSError as error:
    print(f"after exec: descriptor {sys.argv[1]}: {errno.errorcode[error.errno or 0]}")
