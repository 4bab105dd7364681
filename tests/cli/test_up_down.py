"""Starting and ending clusters."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import resource
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from vmmc_emu import Cluster, ClusterError
from vmmc_emu.paths import cluster_paths, known_clusters, lock_path, native_directory, take_lock

Cli = Any  # conftest.Cli
Another = Callable[..., Cli]
Segments = Callable[[str], list[str]]


def kill_at_once(processes: set[int]) -> None:
    """None may bring another back before its own turn comes: they are stopped first.

    Children before their parents: the kernel continues the stopped ones of a group that becomes orphaned.
    """
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 20
    while any(psutil.Process(pid).status() != psutil.STATUS_STOPPED for pid in processes):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for pid in sorted(processes, key=lambda pid: len(psutil.Process(pid).parents()), reverse=True):
        os.kill(pid, signal.SIGKILL)
    wait_gone(processes)


def pids(cli: Cli) -> set[int]:
    status = json.loads(cli.ok("status", "--json"))
    return {node[key] for node in status["nodes"] for key in ("daemon_pid", "nic_pid")} | {
        status["supervisor_pid"]
    }


def wait_gone(found: set[int], timeout: float = 20) -> None:
    processes = []
    for pid in found:
        try:
            processes.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    alive = [p for p in psutil.wait_procs(processes, timeout)[1] if p.status() != psutil.STATUS_ZOMBIE]
    assert alive == []


def test_up_shows_the_nodes_and_what_comes_next(cli: Cli, segments: Segments) -> None:
    output = cli.ok("up", "--nodes", 3)
    lines = output.splitlines()
    assert lines[0].split() == ["NODE", "ADDRESS", "DAEMON", "NIC"]
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["node0", "198.18.0.1"],
        ["node1", "198.18.0.2"],
        ["node2", "198.18.0.3"],
    ]
    for line in lines[1:4]:
        for pid in line.split()[2:]:
            assert psutil.Process(int(pid)).is_running()
    assert f"vmmc-emu --cluster {cli.cluster} run --node 0" in output
    assert segments(cli.cluster)


def test_eight_nodes_when_nobody_says(cli: Cli) -> None:
    cli.ok("up")
    assert len(json.loads(cli.ok("status", "--json"))["nodes"]) == 8


def test_status_json(cli: Cli) -> None:
    cli.ok("up", "--nodes", 2)
    status = json.loads(cli.ok("status", "--json"))
    assert status["cluster"] == cli.cluster
    assert [(n["name"], n["address"], n["address6"], n["state"]) for n in status["nodes"]] == [
        ("node0", "198.18.0.1", "fd00:766d:6d63::1", "up"),
        ("node1", "198.18.0.2", "fd00:766d:6d63::2", "up"),
    ]
    assert len(pids(cli)) == 5
    assert "up" in cli.ok("status")


def test_titles_tell_processes_apart(cli: Cli) -> None:
    cli.ok("up", "--nodes", 2)
    status = json.loads(cli.ok("status", "--json"))
    node = status["nodes"][1]
    assert psutil.Process(node["daemon_pid"]).cmdline()[0] == f"vmmc-emu: {cli.cluster} node1 daemon"
    assert psutil.Process(node["daemon_pid"]).name() == "node1 daemon"
    assert psutil.Process(status["supervisor_pid"]).cmdline()[0] == f"vmmc-emu: {cli.cluster} supervisor"
    nic = psutil.Process(node["nic_pid"]).cmdline()
    assert nic[0] == "vmmc-nic"
    assert nic[nic.index("--node") + 1] == "1"


def test_up_twice(cli: Cli) -> None:
    cli.ok("up", "--nodes", 1)
    before = pids(cli)
    again = cli("up", "--nodes", 1)
    assert again.returncode == 1
    assert again.stderr.startswith("Error: ")
    assert "already up" in again.stderr
    assert again.stdout == ""
    assert pids(cli) == before


def test_the_name_is_taken_wherever_the_files_are(cli: Cli, tmp_path: Path) -> None:
    cli.ok("up", "--nodes", 1)
    again = cli("up", "--nodes", 1, env={"VMMC_RUNTIME_DIR": str(tmp_path)})
    assert again.returncode == 1
    assert "already up" in again.stderr
    assert os.environ["VMMC_RUNTIME_DIR"] in again.stderr
    assert list(tmp_path.iterdir()) == []


def test_found_without_the_variables_that_it_was_started_with(cli: Cli, tmp_path: Path) -> None:
    cli.ok("up", "--nodes", 1)
    env = {name: value for name, value in os.environ.items() if name != "VMMC_RUNTIME_DIR"}
    done = subprocess.run(
        cli.command("status"),
        env={**env, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "node0" in done.stdout


@pytest.mark.parametrize("nodes", [0, -1, 1025])
def test_node_counts_that_cannot_be(cli: Cli, segments: Segments, nodes: int) -> None:
    done = cli("up", "--nodes", nodes)
    assert done.returncode == 1
    assert f"{nodes} nodes" in done.stderr
    assert "1 to 1024" in done.stderr
    assert segments(cli.cluster) == []


@pytest.mark.parametrize("name", ["", "Upper", "a_b", "../x", "a" * 33, "a.b", "a b"])
def test_names_that_cannot_be(another: Another, name: str) -> None:
    command = another().command("up")
    command[command.index("--cluster") + 1] = name
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot name a cluster" in done.stderr


def test_name_from_the_environment(cli: Cli) -> None:
    command = cli.command("up", "--nodes", 1)
    env = {**os.environ, "VMMC_CLUSTER": cli.cluster}
    subprocess.run([word for word in command if word not in {"--cluster", cli.cluster}], env=env, check=True)
    assert pids(cli)


def test_two_at_once_start_one_cluster(cli: Cli) -> None:
    both = [cli.popen("up", "--nodes", 4) for _ in range(2)]
    said = [each.communicate(timeout=60) for each in both]
    assert sorted(each.returncode for each in both) == [0, 1], said
    assert len(pids(cli)) == 9


def test_clusters_side_by_side(cli: Cli, another: Another, segments: Segments) -> None:
    # One name begins with the other: what is removed must match exactly.
    other = another(f"{cli.cluster}-2")
    cli.ok("up", "--nodes", 2)
    other.ok("up", "--nodes", 2)
    assert not pids(cli) & pids(other)
    kept = segments(other.cluster)
    cli.ok("down")
    assert segments(other.cluster) == kept
    assert {node["state"] for node in json.loads(other.ok("status", "--json"))["nodes"]} == {"up"}
    other.ok("down")
    assert segments(other.cluster) == []


def test_down_leaves_nothing(cli: Cli, segments: Segments) -> None:
    cli.ok("up", "--nodes", 3)
    cli.ok("run", "--all", "--detach", "--", sys.executable, "-m", "http.server", 8000)
    Cluster.running(cli.cluster).node(0).wait_for_port(8000)
    found = pids(cli) | {p["pid"] for p in json.loads(cli.ok("ps", "--json"))["programs"]}
    assert len(found) == 7 + 3
    assert "is down" in cli.ok("down")
    wait_gone(found)
    assert segments(cli.cluster) == []
    assert not (Path(os.environ["VMMC_RUNTIME_DIR"]) / cli.cluster).exists()
    assert "was not up" in cli.ok("down")
    assert cli("status").returncode == 1


def test_down_forces_a_program_that_does_not_want_to_end(cli: Cli) -> None:
    cli.ok("up", "--nodes", 1)
    code = (
        "import signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "signal.pause()\n"
    )
    program = cli.popen("run", "--node", 0, "--", sys.executable, "-c", code)
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    began = time.monotonic()
    cli.ok("down")
    assert 1.5 < time.monotonic() - began < 10
    program.communicate(timeout=10)
    assert program.returncode == 128 + signal.SIGKILL


def test_down_ends_programs_that_are_stopped_or_hidden(cli: Cli) -> None:
    """One that is stopped, and the child of one that has wiped the environment it could be known by."""
    cli.ok("up", "--nodes", 1)
    stopped = cli.popen("run", "--node", 0, "--", "sh", "-c", "echo $$; kill -STOP $$; sleep 600")
    hidden = cli.popen("run", "--node", 0, "--", "sh", "-c", "env -i sh -c 'echo $$; sleep 600; true'; true")
    found = set()
    for each in (stopped, hidden):
        assert each.stdout is not None
        found.add(int(each.stdout.readline()))
    cli.ok("down")
    wait_gone(found, 5)
    for each in (stopped, hidden):
        # A stopped job stops its foreground parent too, as with any shell.
        each.send_signal(signal.SIGCONT)
        each.communicate(timeout=10)


def test_down_after_everything_was_killed(cli: Cli, segments: Segments) -> None:
    cli.ok("up", "--nodes", 3)
    cli.ok("run", "--node", 0, "--detach", "--", sys.executable, "-m", "http.server", 8000)
    Cluster.running(cli.cluster).node(0).wait_for_port(8000)
    programs = {p["pid"] for p in json.loads(cli.ok("ps", "--json"))["programs"]}
    kill_at_once(pids(cli) | programs)
    assert segments(cli.cluster)
    assert json.loads(cli.ok("status", "--json"))["state"] == "down"
    refused = cli("run", "--node", 0, "--", "true")
    assert refused.returncode == 1
    assert "its supervisor and daemons were killed" in refused.stderr
    cli.ok("down")
    assert segments(cli.cluster) == []
    assert not (Path(os.environ["VMMC_RUNTIME_DIR"]) / cli.cluster).exists()


def test_down_when_only_the_supervisor_was_killed(cli: Cli, segments: Segments) -> None:
    """At once, that is to say while its successor starts."""
    cli.ok("up", "--nodes", 2)
    found = pids(cli)
    supervisor = json.loads(cli.ok("status", "--json"))["supervisor_pid"]
    os.kill(supervisor, signal.SIGKILL)
    cli.ok("down")
    wait_gone(found)
    assert segments(cli.cluster) == []
    assert not (Path(os.environ["VMMC_RUNTIME_DIR"]) / cli.cluster).exists()


def test_up_on_a_wreck(cli: Cli) -> None:
    cli.ok("up", "--nodes", 3)
    kill_at_once(pids(cli))
    wreck = json.loads(cli.ok("status", "--json"))
    assert wreck["state"] == "down", wreck
    cli.ok("up", "--nodes", 2)
    assert len(pids(cli)) == 5
    assert cli("run", "--node", 2, "--", "true").returncode == 1


def test_up_waits_for_those_who_were_killed_to_let_go_of_the_name(cli: Cli) -> None:
    cli.ok("up", "--nodes", 1)
    kill_at_once(pids(cli))
    held = take_lock(cluster_paths(cli.cluster))
    assert held is not None
    libc = ctypes.CDLL(None)
    opened = libc.inotify_init()
    assert libc.inotify_add_watch(opened, os.fsencode(lock_path(cli.cluster)), 0x20) >= 0  # IN_OPEN
    starting = cli.popen("up", "--nodes", 1)
    os.read(opened, 4096)  # it has looked, or is about to
    os.close(held)
    os.close(opened)
    _, errors = starting.communicate(timeout=60)
    assert starting.returncode == 0, errors


def test_up_where_somebody_else_has_the_name(cli: Cli) -> None:
    cli.ok("up", "--nodes", 1)
    kill_at_once(pids(cli))
    held = take_lock(cluster_paths(cli.cluster))
    assert held is not None
    refused = cli("up", "--nodes", 1)
    os.close(held)
    assert refused.returncode == 1
    assert "is already up" in refused.stderr


def test_up_with_native_files_of_another_version(cli: Cli, segments: Segments, tmp_path: Path) -> None:
    shutil.copytree(native_directory(), tmp_path / "native")
    header = tmp_path / "native" / "include" / "vmmc_attach.h"
    header.write_text(header.read_text().replace("VMMC_CONTROL_WIRE", "VMMC_CONTROL_CABLE"))
    refused = cli("up", env={"VMMC_NATIVE_DIR": str(tmp_path / "native")})
    assert refused.returncode == 1
    assert "of another version, which has no 'VMMC_CONTROL_WIRE'" in refused.stderr
    assert segments(cli.cluster) == []  # the lock is one, too
    shutil.copy(native_directory() / "include" / "vmmc_attach.h", header)
    library = tmp_path / "native" / "libvmmc.so"
    subprocess.run(["cc", "-shared", "-x", "c", os.devnull, "-o", str(library)], check=True)
    refused = cli("up", env={"VMMC_NATIVE_DIR": str(tmp_path / "native")})
    assert refused.returncode == 1
    assert "undefined symbol: vmmc_layout_size" in refused.stderr
    assert segments(cli.cluster) == []


def test_up_where_only_nics_are_left(cli: Cli) -> None:
    """The machine ran out of memory, say: the interpreters are the largest processes."""
    cli.ok("up", "--nodes", 2)
    nics = {node["nic_pid"] for node in json.loads(cli.ok("status", "--json"))["nodes"]}
    kill_at_once(pids(cli) - nics)
    assert json.loads(cli.ok("status", "--json"))["state"] == "abandoned"
    assert "nobody brings them back" in cli.ok("status")
    cli.ok("up", "--nodes", 2)
    wait_gone(nics)
    assert json.loads(cli.ok("status", "--json"))["state"] == "up"


def test_status_when_all_nodes_are_off_and_nobody_supervises(cli: Cli) -> None:
    cli.ok("up", "--nodes", 2)
    cli.ok("node", "kill", "0,1")
    kill_at_once({json.loads(cli.ok("status", "--json"))["supervisor_pid"]})
    assert json.loads(cli.ok("status", "--json"))["state"] == "abandoned"
    cli.ok("up", "--nodes", 2)


def test_down_with_few_descriptors(cli: Cli) -> None:
    """Fewer than there are processes to end."""
    cli.ok("up", "--nodes", 24)
    found = pids(cli)
    kill_at_once(found - {node["nic_pid"] for node in json.loads(cli.ok("status", "--json"))["nodes"]})
    cli.ok("down", prefix=("prlimit", "--nofile=20"))
    wait_gone(found)


def test_a_lock_that_somebody_removed(cli: Cli, segments: Segments) -> None:
    cli.ok("up", "--nodes", 1)
    lock_path(cli.cluster).unlink()
    cli.ok("run", "--node", 0, "--", "true")
    refused = cli("up", "--nodes", 1)
    assert refused.returncode == 1
    assert "is already up" in refused.stderr
    cli.ok("node", "kill", 0)
    cli.ok("node", "start", 0)
    cli.ok("run", "--node", 0, "--", "true")
    found = pids(cli)
    cli.ok("down")
    wait_gone(found)
    assert segments(cli.cluster) == []


def test_a_recorded_pid_that_is_somebody_elses_now_is_left_alone(cli: Cli) -> None:
    cli.ok("up", "--nodes", 1)
    code = "import signal; print(1, flush=True); signal.pause()"
    bystander = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert bystander.stdout is not None
    bystander.stdout.readline()
    records = Path(os.environ["VMMC_RUNTIME_DIR"]) / cli.cluster / "processes"
    record = json.loads((records / "daemon-0").read_text())
    (records / "program-99").write_text(json.dumps({**record, "kind": "program", "pid": bystander.pid}))
    cli.ok("down")
    assert bystander.poll() is None
    bystander.kill()
    bystander.communicate()


def test_all(another: Another) -> None:
    # A runtime directory of its own: `down --all` must not end other tests' clusters.
    directory = Path("/tmp") / f"vmmc-all-{secrets.token_hex(4)}"
    env = {"VMMC_RUNTIME_DIR": str(directory)}
    clusters = [another() for _ in range(2)]
    for cli in clusters:
        cli.ok("up", "--nodes", 1, env=env)
    done = clusters[0].ok("down", "--all", env=env)
    assert {cli.cluster for cli in clusters} == set(re.findall(r"Cluster '(.*)' is down", done))
    assert clusters[0].ok("down", "--all", env=env) == "No cluster is up.\n"
    directory.rmdir()


def test_a_runtime_directory_with_too_long_a_path(cli: Cli, tmp_path: Path) -> None:
    done = cli("up", env={"VMMC_RUNTIME_DIR": str(tmp_path / ("x" * 100))})
    assert done.returncode == 1
    assert "107 bytes" in done.stderr
    assert "VMMC_RUNTIME_DIR" in done.stderr


def test_a_directory_that_others_could_have_planted(cli: Cli, tmp_path: Path) -> None:
    directory = tmp_path / "planted"
    directory.mkdir()
    (tmp_path / "link").symlink_to(directory)
    done = cli("up", "--nodes", 1, env={"VMMC_RUNTIME_DIR": str(tmp_path / "link")})
    assert done.returncode == 1
    assert "not a directory of yours" in done.stderr


def test_modes(cli: Cli, segments: Segments) -> None:
    previous = os.umask(0)  # the modest modes do not come from the caller's mask
    try:
        cli.ok("up", "--nodes", 1)
    finally:
        os.umask(previous)
    runtime = Path(os.environ["VMMC_RUNTIME_DIR"]) / cli.cluster
    assert runtime.stat().st_mode & 0o777 == 0o700
    assert (runtime / "node0.sock").stat().st_mode & 0o777 == 0o600
    for name in segments(cli.cluster):
        assert Path("/dev/shm", name).stat().st_mode & 0o777 == 0o600


def limited(number: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(number, (value, value))


@pytest.mark.parametrize(
    ("number", "value", "said"),
    [
        (resource.RLIMIT_NOFILE, 256, "open files"),
        (resource.RLIMIT_FSIZE, 1 << 30, "largest file"),
        (resource.RLIMIT_AS, 8 << 30, "address space"),
    ],
)
def test_limits_in_the_way(cli: Cli, segments: Segments, number: int, value: int, said: str) -> None:
    done = subprocess.run(
        cli.command("up", "--nodes", 64),
        capture_output=True,
        text=True,
        preexec_fn=limited(number, value),
        check=False,
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert segments(cli.cluster) == []


def test_without_the_native_parts(cli: Cli, tmp_path: Path) -> None:
    done = cli("up", env={"VMMC_NATIVE_DIR": str(tmp_path)})
    assert done.returncode == 1
    assert f"{tmp_path}/vmmc-nic is missing" in done.stderr


@pytest.mark.parametrize("program", ["#!/bin/sh\necho broken >&2\nexit 3\n", "not a program"])
def test_a_nic_that_does_not_start(cli: Cli, segments: Segments, tmp_path: Path, program: str) -> None:
    from vmmc_emu.paths import native_directory

    for each in native_directory().iterdir():
        (tmp_path / each.name).symlink_to(each)
    (tmp_path / "vmmc-nic").unlink()
    (tmp_path / "vmmc-nic").write_text(program)
    (tmp_path / "vmmc-nic").chmod(0o755)
    done = cli("up", "--nodes", 3, env={"VMMC_NATIVE_DIR": str(tmp_path)})
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    if program.startswith("#!"):
        assert "ended with status 3: broken" in done.stderr
    assert segments(cli.cluster) == []
    assert not (Path(os.environ["VMMC_RUNTIME_DIR"]) / cli.cluster).exists()


def test_an_interrupted_up_leaves_nothing(cli: Cli, segments: Segments) -> None:
    program = cli.popen("up", "--nodes", 64)
    # Its first segments show that it is in the middle.
    deadline = time.monotonic() + 20
    while len(segments(cli.cluster)) < 5 and time.monotonic() < deadline:
        os.sched_yield()
    program.kill()
    program.communicate()
    runtime = Path(os.environ["VMMC_RUNTIME_DIR"]) / cli.cluster
    while time.monotonic() < deadline and (segments(cli.cluster) or runtime.exists()):
        os.sched_yield()
    if segments(cli.cluster):  # ready before it was killed: then it is up, whole
        assert {node["state"] for node in json.loads(cli.ok("status", "--json"))["nodes"]} == {"up"}


class TestSmallSharedMemory:
    """In a mount namespace with a /dev/shm of its own."""

    Inside = Callable[[str, str], subprocess.CompletedProcess[str]]

    @pytest.fixture
    def inside(self, with_own_mounts: list[str]) -> Inside:
        """Runs a script of the shell in a /dev/shm of that size."""

        def run(script: str, size: str) -> subprocess.CompletedProcess[str]:
            body = f"mount -t tmpfs -o size={size},mode=1777 tmpfs /dev/shm && {script}"
            return subprocess.run(
                [*with_own_mounts, "sh", "-c", body], capture_output=True, text=True, timeout=60, check=False
            )

        return run

    def test_no_room(self, cli: Cli, inside: Inside) -> None:
        done = inside(f"{' '.join(cli.command('up', '--nodes', 64))}; echo status $?; ls /dev/shm", "1m")
        assert "not enough room in /dev/shm: 64 nodes need 12 MiB there and 1 MiB is free" in done.stderr
        assert done.stdout == "status 1\n"

    def test_programs_are_told_when_it_is_full(self, cli: Cli, inside: Inside) -> None:
        """One that cannot attach, and one whose node cannot make a link: neither waits for ever."""
        v = " ".join(cli.command())
        connect = (
            "import socket\n"
            "try: socket.create_connection((\"node1\", 9))\n"
            "except OSError as error: print(error)\n"
        )
        wait = "import socket\ntry: socket.create_connection((\"node1\", 9))\nexcept OSError: pass\n"
        fill = "head -c 4m /dev/zero > /dev/shm/filler 2>/dev/null"
        script = (
            f"{v} up --nodes 2 && {fill}; {v} run --node 0 -- {sys.executable} -c '{connect}';"
            # Room for a program's segments, and not for a link's two queues.
            f"truncate -s -131072 /dev/shm/filler; {v} run --node 0 -- {sys.executable} -c '{connect}';"
            f"rm /dev/shm/filler; {v} run --node 0 -- {sys.executable} -c '{wait}{connect}'; {v} down"
        )
        done = inside(script, "1m")
        said = done.stdout.splitlines()
        assert re.search(r"cannot use sockets of node0: .*: No space left.*40 KiB are needed", done.stderr)
        assert "[Errno 28] No space left on device" in said[-4], done.stdout + done.stderr
        assert "[Errno 105] No buffer space available" in said[-3]
        assert "[Errno 111] Connection refused" in said[-2]

    def test_eight_nodes_with_programs_fit_in_64_mib(self, cli: Cli, inside: Inside) -> None:
        v = " ".join(cli.command())
        script = (
            (
                f"{v} up && {v} run --all --detach -- {sys.executable} -m http.server 8000 && "
                f"{v} run --all -- {sys.executable} -c '"
                "import time, urllib.request as u\n"
                "for i in range(8):\n"
                "    for attempt in range(200):\n"
                '        try: u.urlopen(f"http://node{{i}}:8000/", timeout=10).read(); break\n'
                "        except OSError: time.sleep(0.05)\n"
                "    else: raise SystemExit(9)\n"
                "'; echo status $?; df --output=used /dev/shm | tail -1; "
                f"{v} down"
            )
            .replace("{{", "{")
            .replace("}}", "}")
        )
        done = inside(script, "64m")
        assert "status 0" in done.stdout, done.stdout + done.stderr


class TestOwned:
    """Clusters that belong to a process: the Python API's."""

    def test_with(self, another: Another, segments: Segments) -> None:
        cli = another()
        name = cli.cluster
        with Cluster(nodes=2, name=name) as cluster:
            found = pids(cli)
            assert len(found) == 5
            assert len(cluster) == len(cluster.nodes) == 2
            assert cluster[1].name == cluster.node("node1").name == "node1"
            assert segments(name)
        wait_gone(found)
        assert segments(name) == []
        # The supervisor was a child of ours: it has been reaped.
        assert not [p for p in psutil.Process().children() if p.status() == psutil.STATUS_ZOMBIE]

    def test_also_after_an_error(self, segments: Segments) -> None:
        name = f"cli-{secrets.token_hex(4)}"
        with pytest.raises(ZeroDivisionError), Cluster(nodes=1, name=name):
            raise ZeroDivisionError
        assert segments(name) == []

    def test_ends_with_its_owner(self, another: Another, segments: Segments) -> None:
        cli = another()
        name = cli.cluster
        code = (
            "import signal, sys\n"
            "from vmmc_emu import Cluster\n"
            "cluster = Cluster(nodes=2, name=sys.argv[1]).start()\n"
            "program = cluster.node(0).popen(['sleep', '600'])\n"
            "print(program.pid, flush=True)\n"
            "signal.pause()\n"
        )
        owner = subprocess.Popen([sys.executable, "-P", "-c", code, name], stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None
        program = int(owner.stdout.readline())
        found = pids(cli) | {program}
        owner.kill()
        owner.communicate()
        wait_gone(found)
        assert segments(name) == []
        assert name not in {place.cluster for place in known_clusters()}

    def test_a_name_that_is_taken(self, cli: Cli) -> None:
        cli.ok("up", "--nodes", 1)
        with pytest.raises(ClusterError, match="already up"):
            Cluster(nodes=1, name=cli.cluster).start()
        with pytest.raises(ClusterError, match="already up"), Cluster(nodes=2, name=cli.cluster):
            pass
        with Cluster.running(cli.cluster) as found:
            assert len(found) == 1
        assert json.loads(cli.ok("status", "--json"))["state"] == "up"

    def test_one_that_is_not_up(self) -> None:
        with pytest.raises(ClusterError, match="is not up"):
            Cluster.running("cli-no-such")

    def test_bad_nodes(self) -> None:
        with pytest.raises(ClusterError, match="1 to 1024"):
            Cluster(nodes=2000).start()


def test_a_cluster_shares_its_terminals_session_and_outlives_it(cli: Cli) -> None:
    """One session is one scheduling group (docs/architecture.md, "Scheduling"); a hang-up ends the shell."""
    ours, terminal = os.openpty()
    try:
        up = cli.command("up", "--nodes", 2)
        run = cli.command("run", "--node", 0, "--detach", "--")
        script = f"{shlex.join(up)} && {shlex.join(run)} sleep 1000 && echo it-is-up && exec sleep 1000"
        shell = subprocess.Popen(
            ["sh", "-c", script], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(terminal)
        said = b""
        while b"it-is-up" not in said:
            said += os.read(ours, 4096)
        before = pids(cli)
        assert {os.getsid(pid) for pid in before} == {shell.pid}
        assert len({os.getpgid(pid) for pid in before} - {shell.pid}) == 1
        detached = json.loads(cli.ok("ps", "--json"))["programs"][0]["pid"]
        assert (os.getsid(detached), os.getpgid(detached)) == (shell.pid, detached)
        assert psutil.Process(detached).terminal() is None
    finally:
        os.close(ours)  # hangs up
    assert shell.wait(20) == -signal.SIGHUP
    assert pids(cli) == before
    assert [each["pid"] for each in json.loads(cli.ok("ps", "--json"))["programs"]] == [detached]
    assert cli.ok("run", "--node", 1, "--", "echo", "still here") == "still here\n"
