"""What one sees of a cluster: programs, sockets, counters, logs, the machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from typing import Any

import pytest
from click.testing import CliRunner
from vmmc_emu.cli import main

from vmmc_emu import Cluster

Cli = Any  # conftest.Cli

SERVER = """
import socket
listener = socket.create_server(("", 9009))
connection, _ = listener.accept()
connection.sendall(b"x" * 1000)
connection.recv(1)
"""
CLIENT = """
import socket
connection = socket.create_connection(("node0", 9009))
print("connected", flush=True)
input()
"""

COUNTERS = (
    "sends", "bytes_sent", "bytes_received", "bytes_redirected", "bytes_default", "bytes_copied",
    "notifications",
    "packets_sent", "packets_received", "packets_resent", "packets_dropped", "commands_rejected", "utlb_hits",
    "utlb_misses", "connections_opened", "connections_refused", "fork_closed_sockets",
)  # fmt: skip


def test_ps(up: Cli) -> None:
    assert up.ok("ps").split() == ["NODE", "PID", "MEMORY", "CPU%", "CPU", "COMMAND"]
    program = up.popen("run", "--node", 1, "--", "sh", "-c", "echo $$; sleep 600; true")
    pid = int(program.stdout.readline())
    lines = [line.split() for line in up.ok("ps").splitlines()[1:]]
    assert [line[:2] for line in lines][:1] == [["node1", str(pid)]]
    programs = json.loads(up.ok("ps", "--json"))["programs"]
    assert [p["node"] for p in programs] == ["node1", "node1"]  # the shell and its child
    assert programs[0]["pid"] == pid
    assert programs[0]["memory_bytes"] > 0
    assert {p["command"] for p in programs} == {"sh -c echo $$; sleep 600; true", "sleep 600"}
    for entry in programs:
        os.kill(entry["pid"], signal.SIGKILL)
    program.communicate(timeout=20)
    assert json.loads(up.ok("ps", "--json"))["programs"] == []


def test_ps_sockets(up: Cli, running: Cluster) -> None:
    server = up.popen("run", "--node", 0, "--", sys.executable, "-c", SERVER)
    running.node(0).wait_for_port(9009)
    client = up.popen("run", "--node", 1, "--", sys.executable, "-c", CLIENT, stdin=subprocess.PIPE)
    assert client.stdout.readline() == "connected\n"
    deadline = time.monotonic() + 20
    while True:  # until the server's bytes have arrived
        output = up.ok("ps", "--sockets")
        rows = [line.split() for line in output.splitlines()[1:]]
        if any(row[1] == "ESTAB" and row[2] == "1000" for row in rows):
            break
        assert time.monotonic() < deadline, output
    found = {(row[0], row[1], row[2]): row for row in rows}
    listening = found["node0", "LISTEN", "0"]
    assert listening[4:6] == ["0.0.0.0:9009", "*:*"]
    receiving = found["node1", "ESTAB", "1000"]
    assert receiving[5] == "198.18.0.1:9009"
    assert receiving[4].startswith("198.18.0.2:")
    assert receiving[6] == os.path.basename(sys.executable)
    sending = found["node0", "ESTAB", "0"]
    assert sending[4:6] == [receiving[5], receiving[4]]
    programs = json.loads(up.ok("ps", "--sockets", "--json"))["programs"]
    assert sorted(s["state"] for p in programs for s in p["sockets"]) == ["ESTAB", "ESTAB", "LISTEN"]
    client.communicate("\n", timeout=20)
    server.communicate(timeout=20)


def test_stats(up: Cli, running: Cluster) -> None:
    before = json.loads(up.ok("stats", "--json"))["nodes"]
    assert set(before) == {f"node{node}" for node in range(4)}
    for node in before.values():
        assert set(COUNTERS) <= set(node)
        assert all(isinstance(value, int) for value in node.values())

    def exchange() -> None:
        import socket
        import threading

        listener = socket.create_server(("", 9010))
        client = socket.create_connection(("node2", 9010))
        server, _ = listener.accept()
        threading.Thread(target=client.sendall, args=(bytes(100_000),)).start()
        left = 100_000
        while left:
            left -= len(server.recv(left))

    running.node(2).python(exchange)
    after = json.loads(up.ok("stats", "--json", "--node", "2"))["nodes"]
    assert set(after) == {"node2"}
    grown = {name: value - before["node2"][name] for name, value in after["node2"].items()}
    assert grown["bytes_sent"] == grown["bytes_received"] == 100_000
    assert grown["bytes_default"] + grown["bytes_redirected"] == 100_000
    assert grown["connections_opened"] >= 1
    # A program's counters stay when it is gone, and reading them changes nothing.
    assert grown["bytes_copied"] == grown["bytes_default"]
    assert json.loads(up.ok("stats", "--json", "--node", "2"))["nodes"] == after


def test_stats_as_a_table(up: Cli) -> None:
    head, *lines = up.ok("stats", "--node", "0,3").splitlines()
    assert head.split() == ["COUNTER", "node0", "node3"]
    assert set(COUNTERS) <= {line.split()[0] for line in lines}
    assert "first transmissions" in up.ok("stats", "--explain")


def test_logs(up: Cli) -> None:
    output = up.ok("run", "--node", 3, "--detach", "--", "sh", "-c", "echo one; echo two >&2; printf three")
    assert "pid" in output
    deadline = time.monotonic() + 20
    while "node3 sh | three" not in (said := up.ok("logs", "--node", 3)):
        assert time.monotonic() < deadline, said
    lines = said.splitlines()
    assert [line for line in lines if " sh | " in line] == [
        "node3 sh | one",
        "node3 sh | two",
        "node3 sh | three",
    ]
    assert any(line.startswith("node3 daemon | ") for line in lines)
    assert any(line.startswith("node3 nic | ") for line in lines)
    assert not any(line.startswith("node2 ") for line in lines)
    everything = up.ok("logs")
    assert "supervisor | " in everything
    assert "node2 nic | " in everything
    assert "node3 program" in everything
    assert "ended with status 0" in everything


def test_logs_follow(cli: Cli) -> None:
    cli.ok("up", "--nodes", 2)
    following = cli.popen("logs", "--node", 1, "--follow")

    def until(text: str) -> None:
        while text not in (line := following.stdout.readline()):
            assert line, f"it ended before it said {text!r}"

    until("node1 nic | ")
    cli.ok("run", "--node", 1, "--detach", "--", "sh", "-c", "echo begins; exec sleep 600")
    until("node1 sh | begins")
    cli.ok("down")
    following.communicate(timeout=20)
    assert following.returncode == 0


def test_logs_follow_interrupted(up: Cli) -> None:
    # Whoever starts the tests in the background may have it ignored.
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    following = up.popen("logs", "--follow", preexec_fn=heard)
    following.stdout.readline()
    following.send_signal(signal.SIGINT)
    _, errors = following.communicate(timeout=20)
    assert following.returncode == 130
    assert errors == ""


def test_output_that_nobody_reads_to_the_end(up: Cli) -> None:
    command = " ".join(up.command("stats", "--explain"))
    done = subprocess.run(["sh", "-c", f"{command} | head -1"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("COUNTER")


def test_doctor(up: Cli, tmp_path: Any) -> None:
    done = up("doctor")
    assert done.returncode == 0, done.stdout
    for what in ("kernel", "shared memory", "open files", "ptrace scope", "NIC program", "preload library"):
        assert what in done.stdout
    broken = up("doctor", env={"VMMC_NATIVE_DIR": str(tmp_path)})
    assert broken.returncode == 1
    assert "FAIL  NIC program" in broken.stdout
    assert "reinstall" in broken.stdout
    assert "2 of these must be mended" in broken.stderr


def test_help_everywhere(up: Cli) -> None:
    overview = up.ok("--help")
    commands = re.findall(r"^  ([a-z]+)  ", overview.partition("\nCommands:\n")[2], re.MULTILINE)
    assert {"up", "down", "status", "run", "logs", "ps", "stats", "node", "link", "bench"} <= set(commands)
    for command in commands:
        for option in ("--help", "-h"):
            shown = CliRunner().invoke(main, [command, option], prog_name="vmmc-emu")
            assert (shown.exit_code, shown.stderr) == (0, "")
            assert shown.stdout.startswith(f"Usage: vmmc-emu {command} ")


def test_unknown_command(up: Cli) -> None:
    done = up("frobnicate")
    assert done.returncode == 2
    assert "No such command 'frobnicate'" in done.stderr


@pytest.mark.parametrize(("words", "expected"), [("vmmc-emu sta", "status"), ("vmmc-emu run --node ", "3")])
def test_completion(up: Cli, words: str, expected: str) -> None:
    env = {
        **os.environ,
        "_VMMC_EMU_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
        "VMMC_CLUSTER": up.cluster,
    }
    command = [word for word in up.command() if word not in {"--cluster", up.cluster}]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert expected in [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_completion_line(up: Cli) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert f"_VMMC_EMU_COMPLETE={shell}_source vmmc-emu" in up.ok("completion", shell)
