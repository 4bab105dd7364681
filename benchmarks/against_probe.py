"""Our unmodified program, kernel TCP, and a bare-path probe, in one session, interleaved; medians.

    python benchmarks/against_probe.py [--probe PROGRAM] [--rounds 5]

The probe is any program that moves bytes over the same hops without a protocol and prints, in lines that
begin with its name, "one-way, 1 byte: X us" and "65536-byte writes: Y GB/s"; it is run as `PROGRAM -q`.
Its lines that begin with "tcp" are not used: kernel TCP is measured here with the same program as VMMC.

It measures too how long a VMMC send of 1 MiB between two segments takes, beside one memcpy of that size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import secrets
import statistics
import subprocess
import sys
from typing import Any

from vmmc_emu import Cluster
from vmmc_emu.bench import KINDS, Path, over_tcp, over_vmmc
from vmmc_emu.paths import native_file

LATENCY_S = 1.0
BANDWIDTH_S = 1.0


def probe(program: str) -> dict[str, float]:
    """Runs the probe once."""
    said = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=120, check=True).stdout
    ours = [line for line in said.splitlines() if not line.startswith("tcp")]
    latency = [m for line in ours if (m := re.search(r"one-way, 1 byte: +([\d.]+) us", line))]
    bandwidth = [m for line in ours if (m := re.search(r"65536-byte writes: +([\d.]+) GB/s", line))]
    if not latency or not bandwidth:
        sys.exit(f"{program} does not say what a probe says:\n{said}")
    return {"latency_us": float(latency[0][1]), "bandwidth_gb_s": float(bandwidth[0][1])}


def program(path: Path) -> dict[str, float]:
    """Runs our socket program once over a path."""
    return {
        "latency_us": KINDS["latency"].figure(path.run("latency", 1, LATENCY_S)),
        "bandwidth_gb_s": KINDS["bandwidth"].figure(path.run("stream", 65536, BANDWIDTH_S)),
    }


def sends_and_copies(cluster: Cluster) -> dict[str, float]:
    """GB/s of VMMC sends of 1 MiB, several under way or one at a time, and of memcpy on the same pages."""
    command = [str(native_file("vmmc-bench-vmmc")), cluster.name, "--rounds", "1", "--seconds", "0.5"]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    return {f"{name}_gb_s": said[name] / 1e9 for name in ("send", "blocking", "memcpy")}


def main() -> None:
    """Measures, prints a table and what is asked of it, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--probe", help="a bare-path program to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rounds: list[dict[str, dict[str, float]]] = []
    with Cluster(nodes=2, name=f"bench-{secrets.token_hex(4)}") as cluster, contextlib.ExitStack() as stack:
        vmmc, tcp = over_vmmc(cluster, stack), over_tcp(stack)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            figures = {"vmmc": program(vmmc), "tcp": program(tcp)}
            if options.probe:
                figures["probe"] = probe(options.probe)
            figures["memory"] = sends_and_copies(cluster)
            rounds.append(figures)
    medians = {
        path: {name: statistics.median(r[path][name] for r in rounds) for name in values}
        for path, values in rounds[0].items()
    }
    if options.json:
        json.dump({"medians": medians, "rounds": rounds}, sys.stdout, indent=2)
        print()
    else:
        show(medians, rounds)


def show(medians: dict[str, Any], rounds: list[dict[str, dict[str, float]]]) -> None:
    """The table, and beside it what a design of this kind should reach."""
    for path, values in medians.items():
        for name, value in values.items():
            each = "  ".join(f"{r[path][name]:.2f}" for r in rounds)
            print(f"{path:<8} {name:<16} {value:8.2f}   ({each})")
    vmmc, tcp, memory = medians["vmmc"], medians["tcp"], medians["memory"]
    print(
        f"latency    {vmmc['latency_us']:.2f} µs (under 20);"
        f" {tcp['latency_us'] / vmmc['latency_us']:.1f} times better than TCP (3)"
    )
    print(f"bandwidth  {vmmc['bandwidth_gb_s'] / tcp['bandwidth_gb_s']:.1f} times TCP's (2)")
    if "probe" in medians:
        bare = medians["probe"]
        print(f"latency    {vmmc['latency_us'] / bare['latency_us']:.2f} times the probe's (at most 2.5)")
        print(f"bandwidth  {vmmc['bandwidth_gb_s'] / bare['bandwidth_gb_s']:.0%} of the probe's (40 %)")
    print(f"1 MiB sends {memory['send_gb_s'] / memory['memcpy_gb_s']:.0%} of one memcpy (70 %)")


if __name__ == "__main__":
    main()
