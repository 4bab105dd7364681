"""Crashes that nobody should notice, or that say what happened: supervisors, daemons, NICs, whole nodes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from vmmc_emu.nodes import journal

import vmmc_emu
from vmmc_emu import Cluster, ClusterError, lifecycle, observe, power, processes, wires
from vmmc_emu.paths import lock_path, native_file

Cli = Any  # conftest.Cli
Segments = Callable[[str], list[str]]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(nodes=3) as cluster:
        yield cluster


def until(condition: Callable[[], Any], what: Callable[[], object] = lambda: "") -> Any:
    """Waits until something is so."""
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.005)
    return found


def kill(pid: int) -> None:
    """Ends a process and waits for that."""
    descriptor = os.pidfd_open(pid)
    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    poll_end(descriptor)


def poll_end(descriptor: int) -> None:
    import select

    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(10_000)
    os.close(descriptor)


def next_supervisor(cluster: Cluster, before: int) -> int:
    """The pid of the successor, once all daemons have joined it."""

    def found() -> int | None:
        status = cluster.status()
        joined = cluster.logs().count("has joined")
        pid = status["supervisor_pid"]
        return pid if pid not in (None, before) and joined >= len(cluster) else None

    return int(until(found, cluster.logs))


def echo(port: int) -> None:
    """Serves one connection."""
    with socket.create_server(("", port)) as listener:
        connection, _ = listener.accept()
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)


class Client:
    """A connection that a program on a node holds, and says what becomes of it."""

    CODE = (
        "import socket, sys\n"
        "c = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "print('connected', flush=True)\n"
        "for line in sys.stdin:\n"
        "    try:\n"
        "        c.sendall(line.encode())\n"
        "        print(c.recv(100).decode().strip(), flush=True)\n"
        "    except OSError as error: print(error.errno, flush=True)\n"
    )

    def __init__(self, cluster: Cluster, node: int, target: int, port: int) -> None:
        self.process = cluster.node(node).popen(
            [sys.executable, "-c", self.CODE, f"node{target}", str(port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.read() == "connected"

    def read(self) -> str:
        assert self.process.stdout is not None
        return str(self.process.stdout.readline()).strip()

    def write(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def exchange(self, text: str) -> str:
        self.write(text)
        return self.read()

    def end(self) -> None:
        self.process.communicate(timeout=20)


# ---- the supervisor ----


def test_a_supervisor_that_is_killed_has_a_successor(cluster: Cluster) -> None:
    """Traffic goes on; then daemons that die have successors again, and so has the successor."""
    server = cluster.node(0).submit(echo, 9200)
    cluster.node(0).wait_for_port(9200)
    client = Client(cluster, 1, 0, 9200)
    before = cluster.status()
    supervisor = before["supervisor_pid"]
    for lives in (1, 2):
        kill(supervisor)
        assert client.exchange("meanwhile") == "meanwhile"
        assert cluster.node(2).run(["true"], check=True).returncode == 0
        supervisor = next_supervisor(cluster, supervisor)
        joined = lives * 3
        until(lambda: cluster.logs().count("has joined") == joined, cluster.logs)
    # It has all that a daemon's successor needs: attached programs, too.
    daemon = cluster.status()["nodes"][0]["daemon_pid"]
    kill(daemon)
    until(lambda: cluster.status()["nodes"][0]["daemon_pid"] not in (None, daemon), cluster.logs)
    until(lambda: "takes over from one that died: NIC" in cluster.node(0).logs(), cluster.logs)
    assert client.exchange("afterwards") == "afterwards"
    now = cluster.status()
    assert now["state"] == "up"
    assert [n["nic_pid"] for n in now["nodes"]] == [n["nic_pid"] for n in before["nodes"]]
    assert now["supervisor_restarts"]["count"] == 2
    client.end()
    server.result(timeout=20)
    until(lambda: not [s for s in cluster.place.segments() if ".ep" in s], cluster.logs)


def test_supervisors_that_are_killed_while_they_begin(cluster: Cluster) -> None:
    """Wherever they have got to: a daemon starts the next, and none is lost."""
    before = cluster.status()
    supervisor = before["supervisor_pid"]
    for _ in range(5):
        last = supervisor
        os.kill(last, signal.SIGKILL)
        supervisor = until(lambda: (now := cluster.status()["supervisor_pid"]) != last and now, cluster.logs)
    daemon = before["nodes"][1]["daemon_pid"]

    def joined() -> bool:
        since = (cluster.place.logs / "supervisor.log").read_text().rpartition(f"supervisor {supervisor} ")[2]
        return since.count("has joined") == len(cluster)

    until(joined, cluster.logs)
    kill(daemon)
    until(lambda: cluster.status()["nodes"][1]["daemon_pid"] not in (None, daemon), cluster.logs)
    assert cluster.node(1).run(["true"], check=True).returncode == 0
    assert cluster.status()["state"] == "up"


def test_detached_programs_and_the_owner_with_a_successor(cli: Cli, segments: Segments) -> None:
    """`run --detach` waits for the next supervisor, and a cluster still ends with its owner."""
    code = (
        "import signal, sys\n"
        "from vmmc_emu import Cluster\n"
        "cluster = Cluster(nodes=2, name=sys.argv[1]).start()\n"
        "print(cluster.status()['supervisor_pid'], flush=True)\n"
        "signal.pause()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-P", "-c", code, cli.cluster], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    supervisor = int(owner.stdout.readline())
    os.kill(supervisor, signal.SIGKILL)
    assert "runs as pid" in cli.ok("run", "--node", 1, "--detach", "--", "sleep", 600)
    status = json.loads(cli.ok("status", "--json"))
    found = {status["supervisor_pid"], *(n[k] for n in status["nodes"] for k in ("daemon_pid", "nic_pid"))}
    descriptors = [os.pidfd_open(pid) for pid in found]
    owner.kill()
    owner.communicate()
    for descriptor in descriptors:
        poll_end(descriptor)
    until(lambda: not segments(cli.cluster))


def test_a_node_that_loses_daemon_and_supervisor_together(cluster: Cluster) -> None:
    """What runs there goes on, status says what is the matter, and a new start mends it."""
    server = cluster.node(0).submit(echo, 9201)
    cluster.node(0).wait_for_port(9201)
    client = Client(cluster, 1, 0, 9201)
    before = cluster.status()
    for pid in (before["supervisor_pid"], before["nodes"][0]["daemon_pid"]):
        os.kill(pid, signal.SIGSTOP)
    for pid in (before["supervisor_pid"], before["nodes"][0]["daemon_pid"]):
        kill(pid)
    until(lambda: cluster.logs().count("has joined") == 2, cluster.logs)
    assert client.exchange("still there") == "still there"
    assert cluster.status()["nodes"][0]["state"] == "no daemon"
    assert "node0 has lost its daemon and the supervisor" in cluster.logs()
    cluster.node(0).kill()
    with pytest.raises(ChildProcessError):
        server.result(timeout=20)
    cluster.node(0).start()
    assert cluster.status()["state"] == "up"
    client.end()


def test_status_says_how_a_node_without_a_daemon_is_mended(cli: Cli) -> None:
    """What is said does so; and nothing is said of a node whose daemon has a successor soon."""

    def status() -> dict[str, Any]:
        return dict(json.loads(cli.ok("status", "--json")))

    cli.ok("up", "--nodes", 3)
    before = status()
    supervisor = before["supervisor_pid"]
    os.kill(supervisor, signal.SIGSTOP)
    try:
        kill(before["nodes"][1]["daemon_pid"])
        assert status()["nodes"][1]["state"] == "no daemon"
        assert "died together" not in cli.ok("status")
    finally:
        os.kill(supervisor, signal.SIGCONT)
    until(lambda: "daemon takes over" in cli.ok("logs", "--node", 1))

    together = [*(before["nodes"][node]["daemon_pid"] for node in (0, 2)), supervisor]
    for pid in reversed(together):
        os.kill(pid, signal.SIGSTOP)
    for pid in together:
        kill(pid)
    until(lambda: "has joined" in cli.ok("logs"))
    hint = cli.ok("status").splitlines()[5]
    assert hint.startswith("node0, node2: the daemon and the supervisor died together: what runs there goes")
    connect = "import socket; socket.create_connection(('node1', 9))"
    refused = cli("run", "--node", 0, "--", sys.executable, "-c", connect)
    assert refused.returncode == 1
    assert "Connection refused (is the cluster up, and has the node a daemon? `vmmc-emu status`" in (
        refused.stderr
    )
    commands = re.findall(r"`vmmc-emu --cluster (\S+) ([^`]+)`", hint)
    assert commands == [(cli.cluster, "node kill 0,2"), (cli.cluster, "node start 0,2")]
    for _, command in commands:
        cli.ok(*command.split())
    assert "died together" not in cli.ok("status")
    cli.ok("run", "--node", 0, "--", sys.executable, "-c", "import socket; socket.create_server(('', 9))")


def test_wires_and_power_that_change_before_daemons_have_joined_the_successor(cluster: Cluster) -> None:
    """They are told when they join."""
    server = cluster.node(1).submit(echo, 9215)
    cluster.node(1).wait_for_port(9215)
    client = Client(cluster, 0, 1, 9215)
    daemons = [node["daemon_pid"] for node in cluster.status()["nodes"]]

    def unheard(by: list[int], change: Callable[[], Any], written: Callable[[], bool]) -> None:
        supervisor = cluster.status()["supervisor_pid"]
        for node in by:  # another one starts the successor
            os.kill(daemons[node], signal.SIGSTOP)
        kill(supervisor)
        with ThreadPoolExecutor() as pool:
            changed = pool.submit(change)
            until(written)
            for node in by:
                os.kill(daemons[node], signal.SIGCONT)
            changed.result(timeout=20)

    unheard([0, 1], cluster.link(0, 1).down, lambda: len(wires.present(cluster.place)) == 2)
    client.write("held")
    until(lambda: cluster.link(0, 1).counters()[0, 1]["wire_dropped"], cluster.logs)
    until(lambda: cluster.logs().count("has joined") == 3, cluster.logs)
    unheard([0, 1], cluster.link(0, 1).up, lambda: not wires.present(cluster.place))
    assert client.read() == "held"
    until(lambda: cluster.logs().count("has joined") == 6, cluster.logs)
    unheard([0], cluster.node(1).kill, lambda: not power.read(cluster.place, 1).on)
    until(lambda: "ESTAB" not in [each.state for each in cluster.node(0).sockets()], cluster.logs)
    assert client.exchange("gone") == str(errno.ETIMEDOUT)
    with pytest.raises(ChildProcessError):
        server.result(timeout=20)
    client.end()


# ---- whole nodes ----


def test_a_node_loses_its_power_and_gets_it_back(cluster: Cluster, segments: Segments) -> None:
    server = cluster.node(2).submit(echo, 9202)
    cluster.node(2).wait_for_port(9202)
    talking, waiting = Client(cluster, 0, 2, 9202), None
    assert talking.exchange("before") == "before"
    program = cluster.node(2).popen(["sleep", "600"])
    bystander = cluster.node(1).popen(["sleep", "600"])
    here = vmmc_emu.attach(0, cluster=cluster.name)
    cluster.node(2).kill()
    assert program.wait(10) == -signal.SIGKILL
    with pytest.raises(ChildProcessError):
        server.result(timeout=10)
    assert [name for name in segments(cluster.name) if ".node2." in name] == []
    status = cluster.status()
    assert (status["state"], status["nodes"][2]["state"]) == ("up", "off")
    # What was connected is told, once; new connections find no way.
    assert talking.exchange("after") == str(errno.ETIMEDOUT)
    assert talking.exchange("again") in (str(errno.EPIPE), "")
    with pytest.raises(OSError, match="No route to host"):
        cluster.node(0).python(lambda: socket.create_connection(("node2", 9202)))
    with pytest.raises(OSError, match="Errno 113"):
        here.import_(2, "anything", timeout_ms=1000)
    with pytest.raises(ClusterError, match="node2 is off: start it with"):
        cluster.node(2).run(["true"])
    with pytest.raises(ClusterError, match="is off already"):
        cluster.node(2).kill()
    assert bystander.poll() is None
    cluster.node(2).start()
    assert cluster.status()["nodes"][2]["state"] == "up"
    with pytest.raises(ClusterError, match="is on"):
        cluster.node(2).start()
    # Empty, and as good as new, both ways, with peers that knew its former life.
    assert cluster.node(2).sockets() == []
    for at, other, port in ((2, 0, 9203), (0, 2, 9204), (1, 2, 9205)):
        server = cluster.node(at).submit(echo, port)
        cluster.node(at).wait_for_port(port)
        waiting = Client(cluster, other, at, port)
        assert waiting.exchange("anew") == "anew"
        waiting.end()
        server.result(timeout=20)
    with vmmc_emu.attach(2, cluster=cluster.name) as there:
        export = there.export(there.alloc(4096), "page")
        here.import_(2, "page", timeout_ms=5000).send(here.alloc(4096), 0, notify=True)
        assert export.notification(5000).length == 4096
    here.detach()
    bystander.kill()
    bystander.wait()
    talking.end()


def test_sleeping_readers_and_connects_hear_of_a_lost_node(cluster: Cluster) -> None:
    def listen() -> None:
        with socket.create_server(("", 9206), backlog=0):
            time.sleep(600)

    def read() -> int:
        with socket.create_connection(("node1", 9206)) as connection:
            try:
                return len(connection.recv(1))
            except OSError as error:
                return error.errno or 0

    def connect() -> int:
        kept = []
        try:
            for _ in range(20):
                kept.append(socket.create_connection(("node1", 9206)))
        except OSError as error:
            return error.errno or 0
        return 0

    server = cluster.node(1).submit(listen)
    cluster.node(1).wait_for_port(9206)
    reader = cluster.node(0).submit(read)
    until(lambda: [s for s in cluster.node(0).sockets() if s.state == "ESTAB"], cluster.logs)
    connecting = cluster.node(2).submit(connect)
    until(lambda: [s for s in cluster.node(2).sockets() if s.state == "SYN-SENT"], cluster.logs)
    cluster.node(1).kill()
    assert reader.result(timeout=10) == errno.ETIMEDOUT
    assert connecting.result(timeout=10) in (errno.ETIMEDOUT, errno.EHOSTUNREACH)
    server.kill()


def test_visitors_hear_that_their_node_is_gone(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    """What they wait for without a timeout ends, with their node's power and with the cluster."""

    def ends_with(end: Callable[[], None]) -> None:
        here = vmmc_emu.attach(1, cluster=cluster.name)
        export = here.export(here.alloc(4096), "page")
        calls: list[Callable[[], object]] = [export.notification, lambda: here.import_(0, "page")]
        found: list[int | None] = []

        def call(wait: Callable[[], object]) -> None:
            try:
                wait()
            except OSError as error:
                found.append(error.errno)

        threads = [threading.Thread(target=call, args=(each,), daemon=True) for each in calls]
        for thread in threads:
            thread.start()
        tasks = [Path(f"/proc/self/task/{thread.native_id}/stat") for thread in threads]
        until(lambda: {task.read_text().rpartition(")")[2].split()[0] for task in tasks} == {"S"})
        end()
        for thread in threads:
            thread.join(20)
        assert found == [errno.ENETDOWN] * 2
        with pytest.raises(OSError, match="its node is gone"):
            here.export(here.alloc(4096), "another")
        here.detach()

    cluster.link(0, 1).set(unreachable="1000s").down()  # so that an import waits
    ends_with(cluster.node(1).kill)
    assert "from node1 and has no network any more: the node has lost its power\n" in capfd.readouterr().err
    cluster.node(1).start()
    ends_with(cluster.stop)


def test_a_lost_node_that_comes_back_while_its_peers_nic_is_dead(cluster: Cluster) -> None:
    """The peer's next NIC finds by itself that what it had is gone."""
    server = cluster.node(2).submit(echo, 9207)
    cluster.node(2).wait_for_port(9207)
    client = Client(cluster, 0, 2, 9207)
    peer = cluster.status()["nodes"][0]
    os.kill(peer["daemon_pid"], signal.SIGSTOP)
    kill(peer["nic_pid"])
    cluster.node(2).kill()
    with pytest.raises(ChildProcessError):
        server.result(timeout=10)
    cluster.node(2).start()
    client.write("anybody there?")
    os.kill(peer["daemon_pid"], signal.SIGCONT)
    assert client.read() in (str(errno.ETIMEDOUT), str(errno.EPIPE))
    server = cluster.node(2).submit(echo, 9208)
    cluster.node(2).wait_for_port(9208)
    again = Client(cluster, 0, 2, 9208)
    assert again.exchange("yes") == "yes"
    for each in (client, again):
        each.end()
    server.result(timeout=20)


def test_a_supervisor_that_is_killed_while_a_node_loses_its_power(
    cluster: Cluster, segments: Segments
) -> None:
    """Its successor does the rest: what is on no node that is on does not go on."""
    server = cluster.node(1).submit(echo, 9216)
    cluster.node(1).wait_for_port(9216)
    client = Client(cluster, 0, 1, 9216)
    before = cluster.status()
    (port,) = cluster.node(1).sockets()[:1]
    ending = [os.pidfd_open(before["nodes"][1][kind]) for kind in ("daemon_pid", "nic_pid")]
    ending.append(os.pidfd_open(port.pid))
    # As if it had been killed when it had written down what it was about to do.
    was = power.read(cluster.place, 1)
    power.write(cluster.place, 1, power.Power(False, was.boot, was.last_serial + 10))
    kill(before["supervisor_pid"])
    for descriptor in ending:
        poll_end(descriptor)
    with pytest.raises(ChildProcessError):
        server.result(timeout=20)
    assert client.exchange("after") == str(errno.ETIMEDOUT)
    until(lambda: not [name for name in segments(cluster.name) if ".node1." in name], cluster.logs)
    assert cluster.status()["nodes"][1]["state"] == "off"
    cluster.node(1).start()
    assert cluster.node(1).run(["true"], check=True).returncode == 0
    assert cluster.status()["state"] == "up"
    client.end()


@pytest.mark.parametrize("who", ["NIC", "daemon", "supervisor"])
def test_status_says_what_is_stopped_and_how_it_goes_on(cli: Cli, who: str) -> None:
    cli.ok("up", "--nodes", 2)
    before = json.loads(cli.ok("status", "--json"))
    assert before["stopped_pids"] == []
    node = before["nodes"][1]
    pid = {"NIC": node["nic_pid"], "daemon": node["daemon_pid"], "supervisor": before["supervisor_pid"]}[who]
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        now = json.loads(cli.ok("status", "--json"))
        assert (now["state"], now["stopped_pids"]) == ("degraded", [pid])
        states = ["up", "up" if who == "supervisor" else "stopped"]
        assert [each["state"] for each in now["nodes"]] == states
        name = "the supervisor" if who == "supervisor" else f"node1's {who}"
        hint = f"Stopped by a signal: {name}; `kill -CONT {pid}` lets it go on."
        assert hint in cli.ok("status").splitlines()
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: json.loads(cli.ok("status", "--json"))["state"] == "up")
    assert "Stopped" not in cli.ok("status")


def test_power_from_the_command_line(cli: Cli) -> None:
    cli.ok("up", "--nodes", 3)
    assert cli.ok("node", "kill", "1-2") == "node1 is off.\nnode2 is off.\n"
    states = [line.split()[3] for line in cli.ok("status").splitlines()[2:5]]
    assert states == ["up", "off", "off"]
    connect = "import socket; socket.create_connection(('node1', 1))"
    assert "No route to host" in cli("run", "--node", 0, "--", sys.executable, "-c", connect).stderr
    refused = cli("run", "--node", 1, "--", "true")
    assert (refused.returncode, "node start 1" in refused.stderr) == (1, True)
    # A supervisor that comes after knows, too.
    supervisor = json.loads(cli.ok("status", "--json"))["supervisor_pid"]
    os.kill(supervisor, signal.SIGKILL)
    assert cli.ok("node", "start", "node1") == "node1 is up, and empty.\n"
    cli.ok("run", "--node", 1, "--", "true")
    assert "there is no node7" in cli("node", "kill", "7").stderr
    assert "node2 is off already" in cli("node", "kill", "2").stderr


# ---- daemons and NICs ----


def test_programs_that_attach_while_their_daemon_dies_notice_nothing(cluster: Cluster) -> None:
    attach = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "import vmmc_emu\n"
        "for line in sys.stdin: vmmc_emu.attach(0).detach(); print('ok', flush=True)\n"
    )
    with cluster.node(0).popen(
        [sys.executable, "-c", attach], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        daemon = 0
        for _ in range(3):
            before = daemon
            daemon = until(lambda: (now := cluster.status()["nodes"][0]["daemon_pid"]) != before and now)
            os.kill(daemon, signal.SIGSTOP)  # it dies with the request in its hands
            program.stdin.write("\n")
            program.stdin.flush()
            os.kill(daemon, signal.SIGKILL)
            assert program.stdout.readline() == "ok\n"
        program.stdin.close()
        assert program.wait(20) == 0


def test_sleepers_are_woken_after_nic_and_daemon_died_together(cluster: Cluster) -> None:
    """In recv, and in poll beside a kernel descriptor, which the NIC wakes by a descriptor that both had."""
    sleeper = (
        "import os, select, socket, sys, threading\n"
        "listener = socket.create_server(('', 9214)); print('ready', flush=True)\n"
        "first, _ = listener.accept(); second, _ = listener.accept()\n"
        "def say(*words): os.write(1, (' '.join(map(str, words)) + '\\n').encode())\n"  # whole lines
        "threading.Thread(target=lambda: say('recv', first.recv(9))).start()\n"
        "poll = select.poll(); poll.register(second, select.POLLIN); poll.register(0, select.POLLIN)\n"
        "say('asleep')\n"
        "found = [number for number, _ in poll.poll()]\n"
        "say('poll', found == [second.fileno()], second.recv(9))\n"
    )
    program = cluster.node(0).popen(
        [sys.executable, "-c", sleeper], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    clients: list[Client] = []
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        clients += [Client(cluster, 1, 0, 9214) for _ in range(2)]
        assert program.stdout.readline() == "asleep\n"
        until(lambda: psutil.Process(program.pid).status() == psutil.STATUS_SLEEPING)
        node = cluster.status()["nodes"][0]
        os.kill(node["daemon_pid"], signal.SIGSTOP)  # it must not bring its NIC back before it dies, too
        kill(node["nic_pid"])
        kill(node["daemon_pid"])
        for client, text in zip(clients, ("one", "two"), strict=True):
            client.write(text)
        said = {program.stdout.readline() for _ in range(2)}
        assert said == {"recv b'one\\n'\n", "poll True b'two\\n'\n"}
        until(lambda: cluster.status()["state"] == "up", cluster.logs)
        recent = cluster.status()["nodes"][0]["restarts"]
        assert (recent["daemon"]["count"], recent["nic"]["count"]) == (1, 1)
    finally:
        for process in (program, *(client.process for client in clients)):
            process.kill()
            process.communicate()


def nic_command(cluster: str, node: int, nodes: int, control: int) -> list[str]:
    """Starts a NIC as a node's daemon does, with that descriptor to its daemon."""
    numbers = {"uid": os.getuid(), "node": node, "nodes": nodes, "control": control}
    options = [each for name, number in numbers.items() for each in (f"--{name}", str(number))]
    return [str(native_file("vmmc-nic")), "--cluster", cluster, *options]


def test_a_nic_that_nobody_knows_of_makes_room(cluster: Cluster) -> None:
    """One that a daemon started last thing before it was killed: never two NICs on a node."""
    status = cluster.status()["nodes"][0]
    os.kill(status["daemon_pid"], signal.SIGSTOP)
    # As if it had been started and not been told of: the predecessor is dead, this one is on no record.
    kill(status["nic_pid"])
    (cluster.place.processes / "nic-0").unlink()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = nic_command(cluster.name, 0, 3, theirs.fileno())
    stray = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
    until(lambda: (found := processes.nic_of(cluster.place, 0)) and found.pid == stray.pid)
    second = subprocess.run(
        nic_command(cluster.name, 0, 3, 1), capture_output=True, text=True, check=False, timeout=20
    )
    assert second.returncode == 1
    assert "another NIC serves this node" in second.stderr
    os.kill(status["daemon_pid"], signal.SIGCONT)
    assert stray.wait(20) == -signal.SIGKILL
    until(lambda: cluster.status()["nodes"][0]["nic_pid"] not in (None, status["nic_pid"]), cluster.logs)
    cluster.node(0).python(lambda: socket.create_server(("", 9210)).close())
    ours.close()
    theirs.close()


@pytest.mark.parametrize("late", [True, False], ids=["before its lock", "after its lock"])
def test_a_nic_that_begins_while_its_node_ends(cli: Cli, program: Callable[..., str], late: bool) -> None:
    """Its daemon was killed before it could write it down, and it has no lock when NICs are looked for."""
    cli.ok("up", "--nodes", 2)
    place = Cluster.running(cli.cluster).place
    node = json.loads(cli.ok("status", "--json"))["nodes"][1]
    os.kill(node["daemon_pid"], signal.SIGSTOP)
    kill(node["nic_pid"])
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asks, say = os.pipe()
    wait, grant = os.pipe()
    stray = subprocess.Popen(
        nic_command(cli.cluster, 1, 2, theirs.fileno()),
        pass_fds=[theirs.fileno(), say, wait], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "LATE_SAY": str(say), "LATE_WAIT": str(wait),
             "LD_PRELOAD": program("late_lock", "-shared", "-fPIC")},
    )  # fmt: skip
    os.close(say)
    assert os.read(asks, 1) == b"!"
    if late:
        cli.ok("node", "kill", 1)
        os.close(grant)
    else:
        os.close(grant)
        until(lambda: processes.nic_of(place, 1))
        lifecycle.remove_segments(place, 1)  # the end of a node, from where nobody looks for its NIC any more
    _, errors = stray.communicate(timeout=20)
    assert (stray.returncode == -signal.SIGKILL) != late
    assert ("shared memory of this node was removed or truncated (state)" in errors) == late
    for descriptor in (asks, wait):
        os.close(descriptor)
    control.close()
    theirs.close()


def test_down_finds_what_is_on_no_record(cli: Cli, segments: Segments) -> None:
    cli.ok("up", "--nodes", 2)
    status = json.loads(cli.ok("status", "--json"))
    pids = [n[k] for n in status["nodes"] for k in ("daemon_pid", "nic_pid")]
    descriptors = [os.pidfd_open(pid) for pid in pids]
    for record in (Path(os.environ["VMMC_RUNTIME_DIR"]) / cli.cluster / "processes").iterdir():
        record.unlink()
    cli.ok("down")
    for descriptor in descriptors:
        poll_end(descriptor)
    assert segments(cli.cluster) == []


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_nic_that_crashes_says_where_and_at_what(cluster: Cluster, number: signal.Signals) -> None:
    def talk() -> None:
        with socket.create_server(("", 9211)) as listener:
            client = socket.create_connection(("node0", 9211))
            server, _ = listener.accept()
            client.sendall(b"x" * 4321)
            server.recv(4321, socket.MSG_WAITALL)

    cluster.node(0).python(talk)
    with vmmc_emu.attach(0, cluster=cluster.name) as here:
        here.export(here.alloc(4096), "page")
        target = here.import_(0, "page", timeout_ms=5000)
        target.send(here.alloc(4096)[:777], 0)
        nic = cluster.status()["nodes"][0]["nic_pid"]
        os.kill(nic, number)
        until(lambda: cluster.status()["nodes"][0]["nic_pid"] not in (None, nic), cluster.logs)
        target.send(here.alloc(4096)[:778], 0)
    log = cluster.node(0).logs()
    assert "error nic node0: " in log
    assert "backtrace" in log
    assert "vmmc-nic(main+" in log  # a frame, by name
    assert re.search(r"  command \d+: op SEND, .* length 777,", log)  # the newest command
    assert re.search(r"  packet \d+: type SEND, .* length 777\n", log)  # and packets
    untimed = re.compile(r"node0 nic \| (?!\d{4}-\d\d-\d\dT[0-9:.]+Z (info|warning|error) nic node0: )")
    assert [line for line in log.splitlines() if untimed.match(line)] == []
    assert f"NIC {nic} was ended by {number.name}" in log
    restarts = cluster.status()["nodes"][0]["restarts"]["nic"]
    assert restarts["count"] == 1
    assert restarts["recent"][0]["how"] == f"was ended by {number.name}"
    assert abs(restarts["recent"][0]["when"] - time.time()) < 60


def test_status_says_what_was_replaced_and_why(cli: Cli) -> None:
    cli.ok("up", "--nodes", 2)
    status = json.loads(cli.ok("status", "--json"))
    os.kill(status["nodes"][1]["daemon_pid"], signal.SIGKILL)
    os.kill(status["nodes"][0]["nic_pid"], signal.SIGTERM)

    def rows() -> dict[tuple[str, str], list[str]] | None:
        lines = [line.split() for line in cli.ok("status").splitlines()[6:]]
        found = {(line[0], line[1]): line[2:] for line in lines}
        return found if len(found) == 2 else None

    found = until(rows)
    assert " ".join(found["node1", "daemon"]).endswith("was ended by SIGKILL")
    assert " ".join(found["node0", "NIC"]).endswith("ended with status 0")
    assert found["node0", "NIC"][0] == "1"


# ---- what comes over sockets, and who may send it ----


def test_nonsense_to_the_supervisor_gets_an_error_and_harms_nobody(cluster: Cluster) -> None:
    before = cluster.status()
    messages: list[bytes] = [
        b"x", b"{", b"[]", b"17", b"null", b"\xff\xfe", b"{}", b'{"node": 99}', b'{"node": "0"}',
        b'{"node": 0}', b'{"what": "kill"}', b'{"what": "kill", "node": -1}', b'{"what": 3, "node": 0}',
        b'{"what": "daemon", "node": 0}', b'{"wires": 3}', b'{"wires": [{}]}', b"[" * 60000,
        b'{"what": "start", "node": 0}', b'{"node": 1e400}', b'{"node": {"a": []}}',
    ]  # fmt: skip
    for message, extra in itertools.product(messages, (0, 1, 3)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(os.fspath(cluster.place.control))
            socket.send_fds(connection, [message], [0] * extra)
            connection.settimeout(10)
            answer = json.loads(connection.recv(65536))
            assert answer["message"], message
    files = [*messages, b'{"enclosed": true}', b'{"node": "' + b"0" * 100_000 + b'"}', b""]
    for content in files:  # and in a file, as large requests come
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
            open(os.memfd_create("request"), "w+b") as file,
        ):
            file.write(content)
            file.flush()
            connection.connect(os.fspath(cluster.place.control))
            socket.send_fds(connection, [b'{"enclosed": true}'], [file.fileno()])
            connection.settimeout(10)
            assert json.loads(connection.recv(65536))["message"], content
    for _ in range(20):  # and some that hang up without a word, or before the answer
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(os.fspath(cluster.place.control))
            connection.send(b"{}")
    cluster.node(0).popen(["true"]).wait()
    now = cluster.status()
    assert (now["supervisor_pid"], now["nodes"]) == (before["supervisor_pid"], before["nodes"])
    assert "a request that is none" in cluster.logs()
    descriptors = os.listdir(f"/proc/{now['supervisor_pid']}/fd")
    assert len(descriptors) < 40, descriptors


def test_a_stopped_supervisor_holds_up_nobody(cluster: Cluster) -> None:
    """More attaches than its sockets hold messages; when it goes on, it has heard of all of them."""
    status = cluster.status()
    os.kill(status["supervisor_pid"], signal.SIGSTOP)
    try:
        attached = [vmmc_emu.attach(0, cluster=cluster.name) for _ in range(400)]
        cluster.node(1).python(lambda: socket.create_server(("", 9212)).close())
    finally:
        os.kill(status["supervisor_pid"], signal.SIGCONT)
    # The NIC says of all of them to the next daemon that it serves them, and that they are gone.
    os.kill(status["nodes"][0]["daemon_pid"], signal.SIGKILL)
    until(lambda: "takes over from one that died: NIC" in cluster.node(0).logs(), cluster.logs)
    for each in attached:
        each.detach()
    until(lambda: not [s for s in cluster.place.segments() if ".ep" in s], cluster.logs)


def test_a_stopped_supervisor_is_named_and_does_not_do_later_what_was_given_up(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "SUPERVISOR_TIMEOUT_S", 0.2)
    supervisor = cluster.status()["supervisor_pid"]
    os.kill(supervisor, signal.SIGSTOP)
    try:
        until(lambda: psutil.Process(supervisor).status() == psutil.STATUS_STOPPED)
        with pytest.raises(ClusterError, match=rf"is stopped .* `kill -CONT {supervisor}`"):
            cluster.link(0, 1).set(loss=0.5)
        with pytest.raises(ClusterError, match="nothing was done"):
            cluster.node(2).kill()
    finally:
        os.kill(supervisor, signal.SIGCONT)
    monkeypatch.undo()
    cluster.link(1, 2).set(one_way=True, loss=0.25)  # it has come to the others before
    assert {pair: wire.loss for pair, wire in wires.present(cluster.place).items()} == {(1, 2): 0.25}
    assert [node["state"] for node in cluster.status()["nodes"]] == ["up", "up", "up"]


def test_a_change_of_wires_is_done_when_the_nics_have_been_told(cluster: Cluster) -> None:
    """It waits for a daemon that is stopped, and for the successor of one that is killed."""
    daemon = cluster.status()["nodes"][1]["daemon_pid"]
    with ThreadPoolExecutor() as pool:
        os.kill(daemon, signal.SIGSTOP)
        change = pool.submit(cluster.link(0, 1).set, one_way=True, loss=0.5)
        until(lambda: wires.present(cluster.place))
        cluster.link(0, 2).set(one_way=True, loss=0.5)
        assert not change.done()  # though the supervisor came to it before
        os.kill(daemon, signal.SIGKILL)
        change.result(timeout=20)
    assert cluster.status()["nodes"][1]["daemon_pid"] != daemon
    assert "the wire from node0" in cluster.node(1).logs()


def test_programs_that_no_supervisor_had_heard_of_when_their_daemon_died(
    cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody has what their next daemon would need: they are told, and those who come have their places."""
    status = cluster.status()
    os.kill(status["supervisor_pid"], signal.SIGSTOP)
    try:
        attached = [vmmc_emu.attach(0, cluster=cluster.name) for _ in range(400)]
        first, last = (each.export(each.alloc(4096), f"page {i}") for i, each in enumerate(attached[::399]))
        kill(status["nodes"][0]["daemon_pid"])
    finally:
        os.kill(status["supervisor_pid"], signal.SIGCONT)
    with pytest.raises(OSError, match="serves this program no more") as raised:
        last.notification()
    assert raised.value.errno == errno.ENETDOWN
    assert "its daemon was killed before anybody else knew of it" in capfd.readouterr().err
    with vmmc_emu.attach(1, cluster=cluster.name) as peer:
        peer.import_(0, "page 0", timeout_ms=5000).send(peer.alloc(8), notify=True)
        assert first.notification(5000).length == 8
    until(lambda: len([s for s in cluster.place.segments() if s.endswith(".nic")]) < 400, cluster.logs)
    attached += [vmmc_emu.attach(0, cluster=cluster.name) for _ in range(10)]
    for each in attached:
        each.detach()
    until(lambda: not [s for s in cluster.place.segments() if ".ep" in s], cluster.logs)
    assert cluster.status()["nodes"][0]["nic_pid"] == status["nodes"][0]["nic_pid"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_can_open_nothing(
    cluster: Cluster, said_by_another_user: Callable[..., str]
) -> None:
    """No segment, file or socket of a cluster, whatever it is for."""
    with vmmc_emu.attach(0, cluster=cluster.name):
        paths = [f"/dev/shm/{name}" for name in cluster.place.segments()]
        paths += [str(lock_path(cluster.name))]
        paths += [str(path) for path in [cluster.place.runtime, *cluster.place.runtime.rglob("*")]]
        assert len(paths) > 20
        code = (
            "import os, socket, sys\n"
            "for path in sys.argv[1:]:\n"
            "    for flags in (os.O_RDONLY, os.O_RDWR):\n"
            "        try: os.open(path, flags); print('opened', path)\n"
            "        except OSError: pass\n"
            "    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            "    try: end.connect(path); print('connected', path)\n"
            "    except OSError: pass\n"
            "print('tried', len(sys.argv) - 1)\n"
        )
        assert said_by_another_user(code, *paths) == f"tried {len(paths)}\n"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_programs_that_drop_privileges(cluster: Cluster) -> None:
    """With a socket before: it goes on.  Without: one line that says why, and an error."""
    before = (
        "import encodings.idna, os, socket\n"
        "listener = socket.create_server(('', 9213))\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "client = socket.create_connection(('198.18.0.1', 9213))\n"
        "server, _ = listener.accept()\n"
        "client.sendall(b'hello'); print(server.recv(5), os.getuid())\n"
    )
    done = cluster.node(0).run([sys.executable, "-c", before])
    assert (done.stdout, done.stderr) == ("b'hello' 65534\n", "")
    after = (
        "import encodings.idna, os, socket\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: socket.create_connection(('198.18.0.1', 9213))\n"
        "except OSError as error: print(error.errno)\n"
    )
    done = cluster.node(0).run([sys.executable, "-c", after])
    assert done.stdout == f"{errno.EACCES}\n"
    assert "a cluster serves the user who started it" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---- logs ----


def test_a_storm_of_events_is_counted_and_not_written(cluster: Cluster) -> None:
    for _ in range(300):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(cluster.place.socket(0)))
            connection.send(b"nonsense")
            assert connection.recv(100) == b""
    lines = [line for line in cluster.node(0).logs().splitlines() if "hung up on pid" in line]
    assert 10 <= len(lines) <= 130  # of 300; a window of ten seconds may have ended on the way
    assert all(" warning node0 " in line for line in lines)


def test_a_storm_in_a_nic_is_counted_and_not_written(cluster: Cluster) -> None:
    for number in range(100):
        wires.change(cluster.place, [wires.Change([0], [1], {"delay_ns": number + 1})])
    wires.change(cluster.place, [wires.Change([2], [1], {"delay_ns": 1})])
    until(lambda: wires.present(cluster.place)[2, 1].delay_ns == 1)

    def lines() -> list[str]:
        return [line for line in cluster.node(1).logs().splitlines() if "the wire from node" in line]

    until(lines, cluster.logs)
    nic = cluster.status()["nodes"][1]["nic_pid"]
    os.kill(nic, signal.SIGTERM)  # what it had to say it has said by then
    until(lambda: "nic node1: ending" in cluster.node(1).logs(), cluster.logs)
    assert 1 <= len([line for line in lines() if "suppressed" not in line]) <= 60


def test_the_last_word_of_a_storm_in_a_nic_is_true(cluster: Cluster) -> None:
    """What stands for lines that were not written has their level, and says what the newest of them said."""
    with vmmc_emu.attach(1, cluster=cluster.name) as here, vmmc_emu.attach(0, cluster=cluster.name) as there:
        here.export(here.alloc(4096), "page")
        there.import_(1, "page", timeout_ms=5000)  # a link that counts what becomes of its wire

        def storm(last: dict[str, Any]) -> None:
            for settings in [*({"up": True, "delay_ns": number + 1} for number in range(30)), last]:
                before = observe.link_counters(cluster.name, 0, 1)["wire_changes"]
                wires.change(cluster.place, [wires.Change([0], [1], settings)])
                until(lambda: observe.link_counters(cluster.name, 0, 1)["wire_changes"] > before)

        def last_words() -> list[str]:
            lines = [line for line in cluster.node(1).logs().splitlines() if "the wire from node" in line]
            return [line for line in lines[-1:] if "suppressed" in line]

        storm({"up": False})
        said = until(last_words, cluster.logs)[0]  # when the time is over
        assert re.search(r"Z info nic node1: \d+ more lines like this were suppressed, ", said), said
        assert said.endswith(": the wire from node0 is cut"), said
        storm({"up": True, "delay_ns": 0})
        os.kill(cluster.status()["nodes"][1]["nic_pid"], signal.SIGTERM)
        said = until(lambda: [line for line in last_words() if "perfect" in line], cluster.logs)[0]
        assert said.endswith(": the wire from node0 is perfect"), said


def test_suppressed_lines_are_counted(capfd: pytest.CaptureFixture[str]) -> None:
    later: list[Callable[[], None]] = []
    journal.begin(lambda _delay, callback: later.append(callback))
    for number in range(1000):
        journal.log(journal.INFO, f"a storm, drop {number}")
    journal.log(journal.ERROR, "something else")
    assert len(later) == 1
    later[0]()
    journal.begin(lambda _delay, _callback: None)
    lines = capfd.readouterr().err.splitlines()
    shown = [line for line in lines if "drop" in line and "suppressed" not in line]
    counted = f"{1000 - len(shown)} more lines like this were suppressed"
    assert lines[-1].endswith(f" info {counted}, the newest: a storm, drop 999")
    assert len(lines) == len(shown) + 2 < 100


def test_levels(cli: Cli) -> None:
    cli.ok("up", "--nodes", 2)
    nic = json.loads(cli.ok("status", "--json"))["nodes"][0]["nic_pid"]
    os.kill(nic, signal.SIGKILL)
    until(lambda: "was ended by SIGKILL" in cli.ok("logs", "--level", "warning"))
    lines = cli.ok("logs", "--level", "warning").splitlines()
    assert lines
    assert all(" warning " in line or " error " in line for line in lines)
    assert "is ready" in cli.ok("logs", "--node", 0)
    cli.ok("run", "--node", 0, "--detach", "--", "echo", "a program says info")
    until(lambda: "a program says info" in cli.ok("logs", "--level", "error"))


def test_a_full_disk_stops_nobody(cli: Cli, with_own_mounts: list[str]) -> None:
    """Logs and records find no room: NICs, daemons and programs come, go and come back all the same."""
    v = " ".join(cli.command())
    code = (
        "import json, os, signal, socket, subprocess, sys, time\n"
        "def status(): return json.loads(subprocess.check_output(sys.argv[1:] + ['status', '--json']))\n"
        "before = status()\n"
        "for what in ('nic_pid', 'daemon_pid'): os.kill(before['nodes'][0][what], signal.SIGKILL)\n"
        "code = 'import socket; l = socket.create_server((\"\", 9));'\n"
        "code += 'c = socket.create_connection((\"node0\", 9));'\n"
        "code += 'c.send(b\"x\"); print(l.accept()[0].recv(1))'\n"
        "for i in range(3):\n"
        "    print(subprocess.run(sys.argv[1:] + ['run', '--node', '0', '--', sys.executable, '-c', code],\n"
        "                         capture_output=True, text=True, timeout=20))\n"
    )
    script = (
        "mkdir $D && mount -t tmpfs -o size=1m,mode=700 tmpfs $D && export VMMC_RUNTIME_DIR=$D;"
        f"{v} up --nodes 2 > /dev/null; head -c 4m /dev/zero > $D/filler 2>/dev/null;"
        f"{sys.executable} -c \"$C\" {v}; {v} down; ls /dev/shm | grep {cli.cluster}; umount $D; rmdir $D"
    )
    done = subprocess.run(
        [*with_own_mounts, "sh", "-c", script], capture_output=True, text=True, timeout=90, check=False,
        env={**os.environ, "D": f"/tmp/{cli.cluster}", "C": code},
    )  # fmt: skip
    assert done.stdout.count("returncode=0, stdout=\"b'x'\\n\", stderr=''") == 3, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"Cluster '{cli.cluster}' is down."


def test_what_finds_no_room_on_a_full_disk_says_where(cli: Cli, with_own_mounts: list[str]) -> None:
    """And that nothing was changed, which is so."""
    v = " ".join(cli.command())
    changes = ("link set node0 node1 loss 1%", "partition 0 1-2", "node kill 1", "node start 2")
    script = (
        "mkdir $D && mount -t tmpfs -o size=1m,mode=700 tmpfs $D && export VMMC_RUNTIME_DIR=$D;"
        f"{v} up --nodes 3 > /dev/null; {v} node kill 2; head -c 4m /dev/zero > $D/filler 2>/dev/null;"
        f"{v} run --node 0,1 --detach -- true;"
        + "".join(f"{v} {each}; echo status $?;" for each in changes)
        + f"{v} link show; {v} status; rm $D/filler; {v} run --node 0 --detach -- true;"
        + "".join(f"{v} {each} > /dev/null && echo done;" for each in changes)
        + f"{v} down; umount $D; rmdir $D"
    )
    done = subprocess.run(
        [*with_own_mounts, "sh", "-c", script], capture_output=True, text=True, timeout=90, check=False,
        env={**os.environ, "D": f"/tmp/{cli.cluster}"},
    )  # fmt: skip
    runtime = f"/tmp/{cli.cluster}/{cli.cluster}"
    at = f"Error: {runtime}"
    full, advice = "No space left on device", "free some space there and try again"
    assert done.stderr.splitlines() == [
        f"Warning: {runtime}/log: {full}: output is lost until some space is free there",
        *[f"{at}/wires: {full}: no link was changed; {advice}"] * 2,
        f"{at}/power: {full}: node1 is as it was; {advice}",
        f"{at}/power: {full}: node2 is as it was; {advice}",
    ]
    assert done.stdout.count("status 1\n") == 4
    assert "Every link is perfect" in done.stdout
    states = re.findall(r"^node\d +\S+ +\S+ +(\w+) ", done.stdout, re.MULTILINE)
    assert states == ["up", "up", "off"], done.stdout
    assert done.stdout.count("done\n") == 4


@pytest.mark.parametrize("left_kib", [0, 64], ids=["from the start", "on the way"])
def test_up_on_a_full_disk_says_where(cli: Cli, with_own_mounts: list[str], left_kib: int) -> None:
    """A page for each file: 64 KiB are less than eight nodes write before they are up."""
    v = " ".join(cli.command())
    script = (
        "mkdir $D && mount -t tmpfs -o size=1m,mode=700 tmpfs $D && export VMMC_RUNTIME_DIR=$D;"
        f"head -c {1024 - left_kib}k /dev/zero > $D/filler 2>/dev/null;"
        f"{v} up --nodes 8; echo status $?; ls $D;"
        f"rm $D/filler; {v} up --nodes 8 > /dev/null && {v} down; umount $D; rmdir $D"
    )
    done = subprocess.run(
        [*with_own_mounts, "sh", "-c", script], capture_output=True, text=True, timeout=90, check=False,
        env={**os.environ, "D": f"/tmp/{cli.cluster}"},
    )  # fmt: skip
    assert done.stderr.startswith(f"Error: /tmp/{cli.cluster}/{cli.cluster}"), done.stderr
    assert "No space left on device: nothing was started; free some space there" in done.stderr
    assert done.stdout.splitlines() == ["status 1", "filler", f"Cluster '{cli.cluster}' is down."]


def asked(cli: Cli, **message: object) -> socket.socket:
    """A request to the supervisor, whose answer somebody else waits for."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(20)
    connection.connect(str(Path(json.loads(cli.ok("status", "--json"))["runtime"]) / "control.sock"))
    connection.send(json.dumps(message).encode())
    return connection


def test_a_node_that_is_killed_while_it_starts(cli: Cli) -> None:
    """Who asked for its start is told."""
    cli.ok("up", "--nodes", 2)
    cli.ok("node", "kill", 1)
    supervisor = json.loads(cli.ok("status", "--json"))["supervisor_pid"]
    os.kill(supervisor, signal.SIGSTOP)
    try:
        start, kill = (asked(cli, what=what, node=1) for what in ("start", "kill"))
    finally:
        os.kill(supervisor, signal.SIGCONT)
    with start, kill:
        answers = [json.loads(each.recv(4096)) for each in (start, kill)]
    assert answers[0].get("message") == "node1 was killed before it was up"
    assert answers[1] == {"node": 1}
    cli.ok("node", "start", 1)
    cli.ok("run", "--node", 1, "--", "true")


def test_a_supervisor_that_dies_while_it_starts_a_node_anew(cli: Cli) -> None:
    """The node is off for a moment, as its record says: the next supervisor goes on."""
    cli.ok("up", "--nodes", 2)
    cluster = Cluster.running(cli.cluster)
    supervisor = json.loads(cli.ok("status", "--json"))["supervisor_pid"]
    os.kill(supervisor, signal.SIGSTOP)
    power.write(cluster.place, 1, power.Power(on=False, boot=1, last_serial=0, restart=True))
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: "node1 is started, for the 2. time" in cluster.logs(), cluster.logs)
    until(lambda: json.loads(cli.ok("status", "--json"))["state"] == "up", cluster.logs)
    cli.ok("run", "--node", 1, "--", "true")


def test_a_successor_that_was_planned_is_not_a_second_daemon(cli: Cli) -> None:
    """Daemons that die young get successors late: a node that began another life meanwhile has one."""
    cli.ok("up", "--nodes", 2)
    logs = Path(json.loads(cli.ok("status", "--json"))["runtime"]) / "log" / "supervisor.log"
    planned = re.compile(r"a successor starts in ([0-9.]+) s")

    def says(text: str) -> bool:
        return text in logs.read_text()

    late = 0.0
    while late < 0.5:
        known = json.loads(cli.ok("status", "--json"))["nodes"][1]["daemon_pid"]
        if known:
            os.kill(known, signal.SIGKILL)
            until(partial(says, f"daemon {known} was"))
        delays = planned.findall(logs.read_text())
        late = float(delays[-1]) if delays else 0.0
    cli.ok("node", "kill", 1)
    cli.ok("node", "start", 1)
    supervisor = psutil.Process(json.loads(cli.ok("status", "--json"))["supervisor_pid"])
    deadline = time.monotonic() + late + 0.5  # what was planned would have come by then
    while time.monotonic() < deadline:
        daemons = [each for each in supervisor.children() if each.name() == "node1 daemon"]
        assert len(daemons) == 1
        time.sleep(0.05)
    cli.ok("run", "--node", 1, "--", "true")
