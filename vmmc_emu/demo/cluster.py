"""`demo cluster`: eight nodes, and programs that nobody here wrote talking across them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from vmmc_emu.cluster import Cluster
from vmmc_emu.demo.stage import Stage, bytes_said

NODES = 8
WEB_PORT = 8000
REDIS_PORT = 6379
FILE_BYTES = 1 << 20


def show(stage: Stage) -> None:
    """Starts eight nodes, runs a web server on each, fetches across, then Redis; shows the counters."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmmc-demo-")))
        stage.heading(f"A cluster of {NODES} nodes")
        cluster = stack.enter_context(Cluster(nodes=NODES, name=f"demo-{secrets.token_hex(4)}"))
        started = cluster.status()["nodes"]
        stage.table(
            ["node", "address", "daemon", "NIC"],
            [[n["name"], n["address"], n["daemon_pid"], n["nic_pid"]] for n in started],
        )
        _web(stage, cluster, directory, stack)
        _redis(stage, cluster, directory, stack)
        _counters(stage, cluster)
    stage.claim(
        not list(Path("/dev/shm").glob(f"vmmc.{os.getuid()}.{cluster.name}.*")),
        "cleaned up: no segment is left",
    )
    stage.end()


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait()


def _web(stage: Stage, cluster: Cluster, directory: Path, stack: contextlib.ExitStack) -> None:
    """A web server on every node, all on one port; every node fetches from every other."""
    stage.heading(f"A web server on every node, all on port {WEB_PORT}")
    server = [sys.executable, "-m", "http.server", str(WEB_PORT)]
    stage.command(0, ["python3", *server[1:]])
    stage.say("  … and so on every other node: each has a port space of its own")
    sums, servers = {}, []
    for node in range(NODES):
        home = directory / f"node{node}"
        home.mkdir()
        content = os.urandom(FILE_BYTES)
        (home / "file").write_bytes(content)
        sums[node] = hashlib.sha256(content).hexdigest()
        process = cluster.node(node).popen(
            server, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
        )
        stack.callback(_end, process)
        servers.append(process)
    for node in range(NODES):
        cluster.node(node).wait_for_port(WEB_PORT)
    kernels = [c for p in servers for c in psutil.Process(p.pid).net_connections("tcp") if c.laddr]
    stage.claim(
        not kernels,
        f"{NODES} servers listen on one port of one machine, and the kernel knows of no TCP socket of theirs",
    )

    stage.heading(f"Every node fetches {bytes_said(FILE_BYTES)} from every other")
    curl = shutil.which("curl")
    stage.command(3, _fetch_command(curl, ["http://node5:8000/file"], ["3-from-5"]))
    fetching = []
    for node in range(NODES):
        others = [other for other in range(NODES) if other != node]
        outputs = [str(directory / f"{node}-from-{other}") for other in others]
        urls = [f"http://node{other}:{WEB_PORT}/file" for other in others]
        command = _fetch_command(curl, urls, outputs)
        fetching.append(cluster.node(node).popen(command, stderr=subprocess.PIPE, text=True))
    for node, process in enumerate(fetching):
        said = process.communicate(timeout=60)[1]
        if process.returncode != 0:
            stage.quote(said)
            stage.claim(False, f"node{node} fetches from the others", f"status {process.returncode}")
    right: dict[tuple[int, int], bool] = {}
    for node in range(NODES):
        for other in range(NODES):
            if node != other:
                content = (directory / f"{node}-from-{other}").read_bytes()
                right[node, other] = hashlib.sha256(content).hexdigest() == sums[other]
    stage.say("  who fetched from whom (✓: the SHA-256 is that of the file on the other node)")
    marks = [
        [
            f"node{node}",
            *("·" if node == other else "✓" if right[node, other] else "✗" for other in range(NODES)),
        ]
        for node in range(NODES)
    ]
    stage.table(["", *(f"node{other}" for other in range(NODES))], marks)
    stage.claim(all(right.values()), f"{len(right)} files fetched, every byte right")


def _fetch_command(curl: str | None, urls: list[str], outputs: list[str]) -> list[str]:
    """Fetches each of `urls` into the output beside it: with curl, or with Python where there is none."""
    if curl:
        pairs = [part for url, output in zip(urls, outputs, strict=True) for part in ("-o", output, url)]
        return ["curl", "-sSf", *pairs]
    program = "import sys, urllib.request as u; [u.urlretrieve(*a.split('=', 1)) for a in sys.argv[1:]]"
    return [sys.executable, "-c", program, *map("=".join, zip(urls, outputs, strict=True))]


def _redis(stage: Stage, cluster: Cluster, directory: Path, stack: contextlib.ExitStack) -> None:
    """Redis on one node, subscribers on all others: connections that stay, to be looked at."""
    stage.heading("Redis on node0, a subscriber on every other node")
    if not (shutil.which("redis-server") and shutil.which("redis-cli")):
        stage.say("  left out: redis-server and redis-cli are not installed here")
        return
    server = [
        "redis-server", "--port", str(REDIS_PORT), "--bind", "0.0.0.0", "--protected-mode", "no",
        "--save", "", "--appendonly", "no",
    ]  # fmt: skip
    stage.command(0, server[:5])
    process = cluster.node(0).popen(
        server, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    stack.callback(_end, process)
    cluster.node(0).wait_for_port(REDIS_PORT)
    client = ["redis-cli", "-h", "node0"]
    subscribers = []
    stage.command(1, [*client, "subscribe", "news"])
    for node in range(1, NODES):
        subscriber = cluster.node(node).popen(
            [*client, "subscribe", "news"], stdout=subprocess.PIPE, text=True
        )
        stack.callback(_end, subscriber)
        subscribers.append(subscriber)
    for subscriber in subscribers:
        # It has subscribed when it says so: "subscribe", the channel, the count.
        assert subscriber.stdout is not None
        for _ in range(3):
            subscriber.stdout.readline()
    stage.say("  vmmc-emu ps --sockets, as it is now:")
    rows = []
    for program in cluster.ps(sockets=True):
        if Path(program["command"].split()[0]).name.startswith("redis"):
            for socket in program["sockets"]:
                rows.append(
                    [
                        program["node"],
                        Path(program["command"].split()[0]).name,
                        socket["state"],
                        socket["local"],
                        socket["peer"],
                    ]
                )
    stage.table(["node", "program", "state", "local", "peer"], rows)
    publish = [*client, "publish", "news", "hello from node7"]
    stage.command(7, [*client, "publish", "news", "'hello from node7'"])
    published = cluster.node(7).run(publish, capture_output=True, text=True, check=True)
    stage.quote(published.stdout)
    heard = 0
    for subscriber in subscribers:
        assert subscriber.stdout is not None
        heard += [subscriber.stdout.readline().strip() for _ in range(3)] == [
            "message",
            "news",
            "hello from node7",
        ]
    stage.claim(heard == NODES - 1, f"{heard} subscribers on {heard} nodes heard it")


def _counters(stage: Stage, cluster: Cluster) -> None:
    stage.heading("What the NICs counted (vmmc-emu stats)")
    counters = cluster.counters()
    shown = ("connections_opened", "packets_sent", "bytes_sent", "bytes_received", "packets_resent")
    stage.table(
        ["node", *shown], [[node, *(values[name] for name in shown)] for node, values in counters.items()]
    )
    fetched = NODES * (NODES - 1) * FILE_BYTES
    received = sum(values["bytes_received"] for values in counters.values())
    stage.claim(
        received >= fetched,
        f"{bytes_said(received)} went through the NICs: {bytes_said(fetched)} of files and some talk",
        str(received),
    )
