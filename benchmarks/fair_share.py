"""What one program takes from another on the same node: medians of rounds that go by turns.

    python benchmarks/fair_share.py [--rounds 5] [--seconds 1]

On node0 a program exchanges 64 bytes with node1, alone; beside one that writes 64 KiB at a time to node1
without pause; beside one that scribbles over its own shared memory while the NIC serves it, and one that just
loops; the first two also over kernel TCP.  Then two writers at once: the slower one's bytes as a share of the
faster one's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import statistics
import subprocess
import sys
from collections.abc import Iterator

from vmmc_emu import Cluster
from vmmc_emu.paths import native_file

# Writes random words all over the segment that its library gave its NIC, as fast as it can.
SCRIBBLER = """
import ctypes, random, socket
socket.create_server(("", 0))  # attaches
maps = [line.split() for line in open("/proc/self/maps") if ".app" in line]
start = min(int(line[0].split("-")[0], 16) for line in maps)
print("scribbling", flush=True)
chance = random.Random(1)
while True:
    ctypes.c_uint64.from_address(start + 64 + chance.randrange(2048) * 8).value = chance.getrandbits(64)
"""


class Path:
    """Over what: two nodes, or kernel TCP."""

    def __init__(self, cluster: Cluster | None) -> None:
        self.cluster = cluster
        # A server each for two clients, since it serves one at a time.
        self.servers = [self.popen(1, [str(native_file("vmmc-bench")), "server", "0"]) for _ in range(2)]
        self.ports = [server.stdout.readline().split()[1] for server in self.servers if server.stdout]

    def popen(self, node: int, command: list[str]) -> subprocess.Popen[str]:
        """Starts a program there."""
        if self.cluster is None:
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self.cluster.node(node).popen(command, stdout=subprocess.PIPE, text=True)

    def start(self, kind: str, size: int, seconds: float, server: int = 0) -> subprocess.Popen[str]:
        """vmmc-bench, from node0 to node1."""
        host = "node1" if self.cluster else "127.0.0.1"
        program = str(native_file("vmmc-bench"))
        return self.popen(0, [program, kind, host, self.ports[server], str(size), str(seconds)])

    def latency_us(self, seconds: float) -> float:
        """Of 64 bytes, one way."""
        return said(self.start("latency", 64, seconds))["median_us"]


def said(process: subprocess.Popen[str]) -> dict[str, float]:
    """What it printed when it was done."""
    output = process.communicate()[0]
    if process.returncode:
        sys.exit(f"{process.args!r} ended with status {process.returncode}")
    found: dict[str, float] = json.loads(output)
    return found


@contextlib.contextmanager
def beside(process: subprocess.Popen[str]) -> Iterator[None]:
    """While it runs; it is ended."""
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def measure(path: Path, seconds: float) -> dict[str, float]:
    """One round."""
    found = {"alone, µs": path.latency_us(seconds)}
    with beside(path.start("stream", 65536, 100 * seconds, server=1)):
        found["beside a writer, µs"] = path.latency_us(seconds)
    if path.cluster:
        scribbler = path.popen(0, [sys.executable, "-c", SCRIBBLER])
        assert scribbler.stdout
        scribbler.stdout.readline()
        with beside(scribbler):
            found["beside a scribbler, µs"] = path.latency_us(seconds)
        with beside(path.popen(0, [str(native_file("vmmc-bench")), "spin"])):
            found["beside a loop, µs"] = path.latency_us(seconds)  # which takes a core, as the scribbler does
    writers = [path.start("stream", 65536, seconds, server) for server in range(2)]
    slower, faster = sorted(each["bytes"] / each["seconds"] for each in map(said, writers))
    found["slower of two writers"] = slower / faster
    return found


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description="What one program takes from another on the same node.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds [5]")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="each measurement [1]")
    asked = parser.parse_args()
    if asked.rounds < 1 or not 0 < asked.seconds <= 60:
        parser.error("--rounds takes a number from 1 up, --seconds one up to 60")
    with Cluster(nodes=2, name=f"share-{secrets.token_hex(4)}") as cluster:
        paths = {"vmmc": Path(cluster), "tcp": Path(None)}
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
        for _ in range(asked.rounds):
            for name, path in paths.items():
                rounds[name].append(measure(path, asked.seconds))
        for path in paths.values():
            for server in path.servers:
                server.kill()
                server.communicate()
    print(f"{'median (lowest to highest)':28}{'vmmc':>26}{'tcp':>26}")
    for what in rounds["vmmc"][0]:
        line = f"{what:28}"
        for of_path in rounds.values():
            values = [each[what] for each in of_path if what in each]
            shown = "-"
            if values:
                shown = f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
            line += f"{shown:>26}"
        print(line)


if __name__ == "__main__":
    main()
