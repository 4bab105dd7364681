"""What programs get, and nonsense in environment variables of ours: one line on stderr, and the default."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from vmmc_emu import Cluster

# Two ends of a connection of this node; says whether the kernel knows of it.
CONNECTION = """
import os, socket
with socket.create_server(("127.0.0.1", 0)) as listener:
    with socket.create_connection(listener.getsockname()) as one, listener.accept()[0] as other:
        one.sendall(b"hello")
        assert other.recv(10) == b"hello"
        inode = os.readlink(f"/proc/self/fd/{one.fileno()}")[8:-1]
        print("kernel" if any(inode in line.split() for line in open("/proc/net/tcp")) else "node")
"""


def served_by(cluster: Cluster, **environment: str) -> tuple[str, list[str]]:
    """By whom its sockets are served, and what it complains of."""
    command = [sys.executable, "-c", CONNECTION]
    # After what makes it run on the node: env(1) replaces that, and means it.
    assignments = [f"{name}={value}" for name, value in environment.items()] + ["VMMC_PLACED=1"]
    done = cluster.node(0).run(["env", *assignments, *command], timeout=60, check=True)
    return done.stdout.strip(), done.stderr.splitlines()


def test_good_values(two_nodes: Cluster) -> None:
    good = {"VMMC_DIAGNOSTICS": "0", "VMMC_PIN_BYTES": "1000000", "VMMC_KERNEL_PORTS": "1,3-5, 7 ,"}
    assert served_by(two_nodes, **good) == ("node", [])
    assert served_by(two_nodes, VMMC_DIAGNOSTICS="", VMMC_KERNEL_PORTS="") == ("node", [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VMMC_KERNEL_PORTS", "http"),
        ("VMMC_KERNEL_PORTS", "0,70000,9-8,-1,%s%n,80x"),
        ("VMMC_DIAGNOSTICS", "perhaps"),
        ("VMMC_DIAGNOSTICS", "x" * 5000),
    ],
)
def test_the_default_is_used(name: str, value: str, two_nodes: Cluster) -> None:
    served, said = served_by(two_nodes, **{name: value})
    assert served == "node"
    assert len(said) == 1
    assert name in said[0]


@pytest.mark.parametrize("value", ["", "-1", "2x", "999999999999", "1e3"])
@pytest.mark.parametrize("name", ["VMMC_NODE", "VMMC_NODES"])
def test_no_place_in_a_cluster(name: str, value: str, two_nodes: Cluster) -> None:
    """The default is that the program is on no node."""
    served, said = served_by(two_nodes, **{name: value})
    assert served == "kernel"
    assert len(said) == 1
    assert name in said[0]


def test_no_daemon_there(two_nodes: Cluster) -> None:
    """A daemon that does not answer is not taken for none: sockets would leave the node unseen."""
    listen = [sys.executable, "-c", "import socket; socket.create_server(('', 0))"]
    done = two_nodes.node(0).run(["env", "VMMC_PLACED=1", "VMMC_SOCKET=/nonsense", *listen], timeout=60)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("vmmc: ")]
    assert len(said) == 1
    assert "/nonsense" in said[0]


def test_an_empty_daemon_is_none(two_nodes: Cluster) -> None:
    assert served_by(two_nodes, VMMC_SOCKET="") == ("kernel", [])


def test_a_launcher_that_passes_on_its_environment(two_nodes: Cluster) -> None:
    """What it starts by way of the other node is there, as its name and its addresses say."""
    name = "import socket; s = socket.create_server(('', 0)); c = socket.create_connection(s.getsockname())"
    where = "; print(socket.gethostname(), socket.gethostbyname(socket.gethostname()))"
    forward = (
        "import os, subprocess, sys\n"
        "own = [f'{name}={value}' for name, value in os.environ.items()]\n"
        "remote = [sys.executable, '-P', '-m', 'vmmc_emu.cli', 'run', '--node', '1', '--', 'env', *own]\n"
        "for program in ([], ['sh', '-c', 'exec \"$0\" \"$@\"']):\n"
        "    subprocess.run([*remote, *program, sys.executable, '-c', sys.argv[1]], check=True)\n"
    )
    done = two_nodes.node(0).run([sys.executable, "-c", forward, name + where], timeout=60, check=True)
    assert done.stdout == 2 * "node1 198.18.0.2\n"


def test_a_program_on_a_node_starts_one_on_another(two_nodes: Cluster) -> None:
    command = [sys.executable, "-P", "-m", "vmmc_emu.cli", "run", "--node", "1", "--", "hostname"]
    script = 'hostname; "$@"; exec "$@"'
    done = two_nodes.node(0).run(["sh", "-c", script, "sh", *command], timeout=60, check=True)
    assert done.stdout == "node0\nnode1\nnode1\n"


def test_the_mark_of_a_place_is_gone_when_a_program_starts(two_nodes: Cluster) -> None:
    done = two_nodes.node(0).run(["sh", "-c", "env | grep VMMC_ | cut -d= -f1"], timeout=60, check=True)
    assert "VMMC_NODE" in done.stdout.split()
    assert "VMMC_PLACED" not in done.stdout.split()


def test_no_restartable_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """They make a change of process dearer.  Who asks for them has them; what else the user says stays."""
    size = "__import__('ctypes').c_uint.in_dll(__import__('ctypes').CDLL(None), '__rseq_size').value"
    has = f"import os; print({size} > 0, os.environ.get('GLIBC_TUNABLES'))"
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    here = subprocess.run([sys.executable, "-c", has], capture_output=True, text=True, check=False)
    if here.stdout.strip() != "True None" or os.uname().machine != "x86_64":
        pytest.skip("this C library registers none here, or needs them")
    with Cluster(nodes=1, name=f"test-{secrets.token_hex(6)}") as cluster:

        def shown() -> str:
            done = cluster.node(0).run([sys.executable, "-c", has], timeout=60, check=True)
            return str(done.stdout).strip()

        assert shown() == "False glibc.pthread.rseq=0"
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
        assert shown() == "False glibc.malloc.check=0:glibc.pthread.rseq=0"
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.pthread.rseq=1")
        assert shown() == "True glibc.pthread.rseq=1"
        nic = cluster.status()["nodes"][0]["nic_pid"]
        assert b"glibc.pthread.rseq=0" in Path(f"/proc/{nic}/environ").read_bytes()
