"""How long what is killed is missed: medians and the longest, in milliseconds.

    python benchmarks/recovery.py [--times 20]

A client on node0 plays ping-pong with a server on node1 over one connection, unless the row says otherwise.
The limits are what the project promises; no test asserts a time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import vmmc_emu
from vmmc_emu import Cluster

SERVER = """
import socket, threading
listener = socket.create_server(("", 0))
print(listener.getsockname()[1], flush=True)
def serve(connection):
    while data := connection.recv(65536): connection.sendall(data)
while True: threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()
"""

CLIENT = """
import socket, sys, time
connection = socket.create_connection(("node1", int(sys.argv[1])))
for line in sys.stdin:
    connection.sendall(b"x")
    assert connection.recv(1) == b"x"
    print(time.monotonic(), flush=True)
"""

READER = """
import socket, sys, time
connection = socket.create_connection(("node1", int(sys.argv[1])))
print("connected", flush=True)
try: connection.recv(1)
except OSError: pass
print(time.monotonic(), flush=True)
"""


# What dies younger waits longer for its successor, on purpose (nodes/daemon.py).
OLD_ENOUGH_S = 1.1


class Bench:
    """A cluster of two nodes, a server on node1 and a client of it on node0."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.server, self.port = self._serve()
        self.client = self._python(0, CLIENT, self.port)
        self.exchange()

    def _python(self, node: int, program: str, *arguments: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", program, *arguments]
        return self.cluster.node(node).popen(command, stdin=pipe, stdout=pipe, text=True)

    def _serve(self) -> tuple[subprocess.Popen[str], str]:
        server = self._python(1, SERVER)
        assert server.stdout
        return server, server.stdout.readline().strip()

    def exchange(self) -> float:
        """When a byte had been there and back."""
        assert self.client.stdin
        assert self.client.stdout
        self.client.stdin.write("\n")
        self.client.stdin.flush()
        return float(self.client.stdout.readline())

    def _kill(self, *keys: str) -> float:
        node = self.cluster.status()["nodes"][1]
        began = time.monotonic()
        for key in keys:
            os.kill(node[key], signal.SIGKILL)
        return began

    def nic(self) -> float:
        """node1's NIC dies; the connection's next byte is back."""
        began = self._kill("nic_pid")
        return self.exchange() - began

    def nic_and_daemon(self) -> float:
        """Both die; the connection's next byte is back."""
        began = self._kill("daemon_pid", "nic_pid")
        return self.exchange() - began

    def daemon(self) -> float:
        """node1's daemon dies; a program attaches."""
        began = self._kill("daemon_pid")
        while True:
            with contextlib.suppress(OSError), vmmc_emu.attach(1, cluster=self.cluster.name):
                return time.monotonic() - began

    def program(self) -> float:
        """A program dies; its peer, asleep in recv, hears of the end."""
        server, port = self._serve()
        reader = self._python(0, READER, port)
        assert reader.stdout
        reader.stdout.readline()
        began = time.monotonic()
        server.kill()
        heard = float(reader.stdout.readline())
        server.wait()
        reader.wait()
        return heard - began

    def wire(self) -> float:
        """A wire with traffic on it is changed, and is so when the call returns."""
        began = time.monotonic()
        self.cluster.link(0, 1).set(delay=0.001)
        took = time.monotonic() - began
        self.exchange()
        self.cluster.link(0, 1).reset()
        return took

    def end(self) -> None:
        """Ends its programs."""
        for process in (self.client, self.server):
            process.kill()
            process.wait()


ROWS: list[tuple[str, int, Callable[[Bench], float]]] = [
    ("NIC killed: the next byte is back", 50, Bench.nic),
    ("NIC and daemon killed: the next byte is back", 1000, Bench.nic_and_daemon),
    ("daemon killed: a program attaches", 1000, Bench.daemon),
    ("program killed: its peer's recv returns", 100, Bench.program),
    ("link set: in force", 100, Bench.wire),
]


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """One that is gone afterwards."""
    with Cluster(nodes=2, name=f"recovery-{secrets.token_hex(4)}") as cluster:
        made = Bench(cluster)
        try:
            yield made
        finally:
            made.end()


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description="How long what is killed is missed.")
    parser.add_argument("--times", type=int, default=20, metavar="N", help="how often each [20]")
    times = parser.parse_args().times
    if times < 1:
        parser.error("--times takes a number from 1 up")
    print(f"{'':46}{'median':>8}{'longest':>9}{'limit':>7}   ms")
    for what, limit_ms, measure in ROWS:
        with bench() as made:
            found = []
            for _ in range(times):
                found.append(measure(made) * 1000)
                time.sleep(OLD_ENOUGH_S)
        print(f"{what:46}{statistics.median(found):8.1f}{max(found):9.1f}{limit_ms:7}")


if __name__ == "__main__":
    main()
