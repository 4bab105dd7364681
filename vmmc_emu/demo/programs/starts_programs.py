"""Has a connection and starts other programs in every usual way; the connection goes on.

starts_programs.py HOST PORT
"""

import os
import socket
import subprocess
import sys

connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10)
connection.recv(4096)


def still_works(after: str) -> None:
    """Sends a line over the connection and compares what comes back."""
    connection.sendall(after.encode() + b"\n")
    answer = connection.recv(4096).decode().strip()
    print(f"{after}: {'the connection works' if answer == after else f'got {answer!r}'}", flush=True)


subprocess.run(["true"], check=True)
still_works("subprocess")
subprocess.run(["true"], check=True, close_fds=False, preexec_fn=os.setsid)  # the way that forks
still_works("subprocess with preexec_fn")
os.waitpid(os.posix_spawn("/bin/true", ["true"], dict(os.environ)), 0)
still_works("posix_spawn")
os.system("true")
still_works("system")
with os.popen("true") as pipe:
    pipe.read()
still_works("popen")
