"""Running programs on nodes."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import pty
import select
import signal
import socket
import stat
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from vmmc_emu import Cluster

Cli = Any  # conftest.Cli


# ---- one node, in the foreground ----


def test_place_and_arguments(up: Cli) -> None:
    code = (
        "import os, socket, sys\n"
        "print(os.environ['VMMC_NODE'], os.environ['VMMC_CLUSTER'], socket.gethostname(), sys.argv[1:])"
    )
    output = up.ok(
        "run", "--node", 2, "--", sys.executable, "-c", code, "{node}.rdb", "a b", "--node", "--", ""
    )
    assert output == f"node2 {up.cluster} node2 ['node2.rdb', 'a b', '--node', '--', '']\n"


def test_without_dashes_before_the_program(up: Cli) -> None:
    assert up.ok("run", "--node", "node1", "echo", "-n", "--all") == "--all"


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_exit_status(up: Cli, status: int) -> None:
    assert up("run", "--node", 0, "--", "sh", "-c", f"exit {status}").returncode == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGPIPE])
def test_exit_status_of_a_signal(up: Cli, number: signal.Signals) -> None:
    assert up("run", "--node", 0, "--", "sh", "-c", f"kill -{int(number)} $$").returncode == 128 + number


def test_standard_descriptors(up: Cli) -> None:
    done = up("run", "--node", 0, "--", "sh", "-c", "cat; echo err >&2", input="in\n")
    assert (done.stdout, done.stderr, done.returncode) == ("in\n", "err\n", 0)


def test_not_found_and_not_executable(up: Cli, tmp_path: Path) -> None:
    done = up("run", "--node", 0, "--", "no-such-program")
    assert done.returncode == 127
    assert done.stderr.startswith("Error: no-such-program is not found")
    (tmp_path / "file").write_text("text")
    done = up("run", "--node", 0, "--", tmp_path / "file")
    assert done.returncode in (126, 127)
    assert done.stderr.startswith("Error: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signals_are_passed_on(up: Cli, number: signal.Signals) -> None:
    code = (
        # Blocked and waited for: one that comes between a look and pause() would be waited for in vain.
        "import signal, sys\n"
        f"signal.pthread_sigmask(signal.SIG_BLOCK, {{{int(number)}}})\n"
        "print('ready', flush=True)\n"
        f"sys.exit(40 + signal.sigwait({{{int(number)}}}))\n"
    )
    program = up.popen("run", "--node", 0, "--", sys.executable, "-c", code)
    assert program.stdout.readline() == "ready\n"
    program.send_signal(number)
    program.communicate(timeout=20)
    assert program.returncode == 40 + number


def test_the_terminal_is_the_programs(up: Cli) -> None:
    """Size, control characters and job control reach it; Ctrl-C reaches it once."""
    code = (
        "import os, signal, sys, termios\n"
        "count = 0\n"
        # Not print: the signal may come while the line below is being printed, and print is not reentrant.
        "def note(n, f):\n    global count; count += 1; os.write(1, b'interrupt %d\\n' % count)\n"
        "signal.signal(signal.SIGINT, note)\n"
        "print('tty', os.isatty(0), os.isatty(1), os.get_terminal_size().columns, flush=True)\n"
        "print('line', sys.stdin.readline().strip(), flush=True)\n"
    )
    parent, child = pty.openpty()
    termsize = bytes([24, 0, 77, 0, 0, 0, 0, 0])
    fcntl.ioctl(child, termios.TIOCSWINSZ, termsize)

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = up.command("run", "--node", 0, "--", sys.executable, "-c", code)
    program = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, preexec_fn=own_terminal)
    os.close(child)
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 20
        while text not in seen:
            assert select.select([parent], [], [], max(0, deadline - time.monotonic()))[0], seen
            seen += os.read(parent, 4096)

    until(b"tty True True 77")
    os.write(parent, b"\x03")
    until(b"interrupt 1")
    os.write(parent, b"hello\n")
    until(b"line hello")
    assert b"interrupt 2" not in seen
    assert program.wait(20) == 0
    os.close(parent)


def test_a_job_that_stops_stops_the_command_too(up: Cli) -> None:
    program = up.popen("run", "--node", 0, "--", "sh", "-c", "echo $$; kill -STOP $$; echo continued")
    pid = int(program.stdout.readline())
    os.waitid(os.P_PID, program.pid, os.WSTOPPED)
    os.kill(pid, signal.SIGCONT)
    program.send_signal(signal.SIGCONT)
    assert program.communicate(timeout=20)[0] == "continued\n"
    assert program.returncode == 0


def test_default_signal_dispositions(up: Cli) -> None:
    """What the interpreter of the command ignores (SIGPIPE) is not ignored in the program."""
    show = ["grep", "-E", "Sig(Ign|Blk)", "/proc/self/status"]
    output = up.ok("run", "--node", 0, "--", *show)
    # What these tests were started with stays: nohup's SIGHUP.
    directly = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    standard = (1 << 31) - 1  # above them are the C library's own
    found, expected = (
        [int(line.split()[1], 16) & standard for line in said.splitlines()] for said in (output, directly)
    )
    assert found == expected
    assert not found[1] & 1 << (signal.SIGPIPE - 1)


def test_library_path_of_the_user_is_kept(up: Cli) -> None:
    output = up.ok("run", "--node", 0, "--", "sh", "-c", "echo $LD_PRELOAD", env={"LD_PRELOAD": "libm.so.6"})
    first, second = output.strip().split(":")
    assert first.endswith("/libvmmc-preload.so")
    assert second == "libm.so.6"


def test_chdir(up: Cli, tmp_path: Path) -> None:
    output = up.ok("run", "--node", 3, "--chdir", tmp_path / "a" / "{node}", "--", "pwd")
    assert output == f"{tmp_path}/a/node3\n"
    relative = up.ok("run", "--node", 3, "--chdir", "here", "--", "pwd", cwd=tmp_path)
    assert relative == f"{tmp_path}/here\n"
    (tmp_path / "file").touch()
    done = up("run", "--node", 0, "--chdir", tmp_path / "file" / "x", "--", "pwd")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot make the directory" in done.stderr


def test_diagnose(up: Cli) -> None:
    assert up.ok("run", "--node", 0, "--diagnose", "--", "sh", "-c", "echo $VMMC_DIAGNOSTICS") == "1\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say where"),
        (["--node", "4"], "there is no node4: the cluster has node0 to node3"),
        (["--node", "x"], "'x' is not a node"),
        (["--node", "2-1"], "counts backwards"),
        (["--node", "0-9"], "there is no node9"),
        (["--node", ""], "'' is not a node"),
        (["--node", "0", "--all"], "--all is every node"),
        (["--node", "0-1", "--publish", "0:80"], "leads to one node"),
        (["--all", "--publish", "0:80"], "leads to one node"),
        (["--node", "0", "--publish", "80"], "'80' is not HOST:NODE"),
        (["--node", "0", "--publish", "80:0"], "'80:0' is not HOST:NODE"),
        (["--node", "0", "--publish", "70000:80"], "is not HOST:NODE"),
    ],
)
def test_arguments_that_make_no_sense(up: Cli, arguments: list[str], said: str) -> None:
    done = up("run", *arguments, "--", "echo", "ran")
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert done.stdout == ""


def test_on_a_cluster_that_is_not_up(cli: Cli) -> None:
    for command in (["run", "--node", 0, "true"], ["ps"], ["stats"], ["status"], ["logs"]):
        done = cli(*command)
        assert done.returncode == 1
        start = f"`vmmc-emu --cluster {cli.cluster} up`"
        assert done.stderr == f"Error: cluster '{cli.cluster}' is not up: start it with {start}\n"


# ---- several nodes ----


def test_several_nodes_with_prefixes(up: Cli) -> None:
    done = up(
        "run", "--node", "0,2", "--node", "2-3", "--", "sh", "-c", "echo out; echo err >&2; printf rest"
    )
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == sorted(
        f"node{node} | {word}" for node in (0, 2, 3) for word in ("out", "rest")
    )
    assert sorted(done.stderr.splitlines()) == [f"node{node} | err" for node in (0, 2, 3)]


def test_all_nodes(up: Cli) -> None:
    lines = up.ok("run", "--all", "--", "sh", "-c", "echo $VMMC_NODE {node}").splitlines()
    assert sorted(lines) == [f"node{node} | node{node} node{node}" for node in range(4)]


def test_exit_status_is_that_of_the_first_that_failed(up: Cli, tmp_path: Path) -> None:
    later = f"until [ -e {tmp_path}/go ]; do sleep 0.05; done; exit 5"
    script = f"case $VMMC_NODE in node1) exit 4;; node3) {later};; esac"
    program = up.popen("run", "--all", "--", "sh", "-c", script + f"; sleep 0.3; touch {tmp_path}/go")
    program.communicate(timeout=30)
    assert program.returncode == 4


def test_long_lines_come_whole(up: Cli) -> None:
    code = "print(('x' * 200_000 + '\\n') * 3, end='')"
    lines = up.ok("run", "--all", "--", sys.executable, "-c", code).splitlines()
    assert sorted(lines) == sorted(f"node{node} | {'x' * 200_000}" for node in range(4) for _ in range(3))


def test_interrupt_ends_all(up: Cli, tmp_path: Path) -> None:
    code = "import time; print('ready', flush=True); time.sleep(600)"
    program = up.popen("run", "--all", "--", sys.executable, "-c", code)
    for _ in range(4):
        assert "ready" in program.stdout.readline()
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=20)
    assert program.returncode == 128 + signal.SIGINT
    assert errors.count("KeyboardInterrupt") == 4


def test_interrupt_forces_those_that_ignore_it(up: Cli) -> None:
    script = "trap '' INT TERM; echo ready; while :; do sleep 1; done"
    program = up.popen("run", "--node", "0-1", "--", "sh", "-c", script)
    for _ in range(2):
        assert "ready" in program.stdout.readline()
    program.send_signal(signal.SIGINT)
    program.communicate(timeout=30)
    assert program.returncode == 128 + signal.SIGKILL


def test_interrupt_ends_what_programs_left_in_the_background(up: Cli) -> None:
    # A shell lets what it starts in the background ignore SIGINT.
    program = up.popen("run", "--node", "0-1", "--", "sh", "-c", "sleep 600 & echo $!")
    left = {int(program.stdout.readline().split("| ")[1]) for _ in range(2)}
    program.send_signal(signal.SIGINT)
    program.communicate(timeout=30)
    assert program.returncode == 128 + signal.SIGINT
    deadline = time.monotonic() + 20  # a process closes its output a moment before it is gone
    while left & {each["pid"] for each in json.loads(up.ok("ps", "--json"))["programs"]}:
        assert time.monotonic() < deadline


def test_interrupt_does_not_wait_for_what_got_away(up: Cli) -> None:
    script = "trap '' INT TERM; setsid sleep 600 & echo $!; while :; do sleep 1; done"
    program = up.popen("run", "--all", "--", "sh", "-c", script)
    away = [int(program.stdout.readline().split("| ")[1]) for _ in range(4)]
    program.send_signal(signal.SIGINT)
    program.wait(timeout=30)
    assert program.returncode == 128 + signal.SIGKILL
    for pid in away:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    program.communicate(timeout=20)


def test_colours_where_there_is_a_terminal(up: Cli) -> None:
    for no_color in ("", "1"):
        parent, child = pty.openpty()
        command = up.command("run", "--node", "0-1", "--", "echo", "x")
        env = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm"}
        program = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=child, stderr=child, env=env)
        program.wait(20)
        os.close(child)
        seen = os.read(parent, 65536)
        os.close(parent)
        assert seen.count(b"node") == 2
        assert (b"\x1b[" in seen) == (not no_color)


# ---- detached ----


def test_detach(up: Cli, running: Cluster, tmp_path: Path) -> None:
    script = "ulimit -n; umask; echo $WORD {node}; pwd; echo err >&2; exec sleep 600"
    output = up.ok(
        "run", "--node", "0,1", "--detach", "--chdir", tmp_path / "{node}", "--", "sh", "-c", script,
        env={"WORD": "hällo"}, prefix=("sh", "-c", 'ulimit -Sn 333; umask 027; exec "$@"', "sh"),
    )  # fmt: skip
    pids = [int(line.split("pid ")[1].split(";")[0]) for line in output.splitlines()]
    assert len(pids) == 2
    found = {p["pid"]: p for p in json.loads(up.ok("ps", "--json"))["programs"]}
    for node, pid in enumerate(pids):
        assert found[pid]["node"] == f"node{node}"
        expected = ["333", "0027", f"hällo node{node}", f"{tmp_path}/node{node}", "err"]
        deadline = time.monotonic() + 20
        while True:
            logs = up.ok("logs", "--node", node)
            lines = [
                line.partition(" | ")[2] for line in logs.splitlines() if line.startswith(f"node{node} sh | ")
            ]
            if lines == expected:
                break
            assert time.monotonic() < deadline, logs
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while f"node1 program {pids[1]} was ended by SIGTERM" not in up.ok("logs"):
        assert time.monotonic() < deadline


def test_long_lines_and_lines_in_pieces(up: Cli) -> None:
    long = "x" * 20_000_000
    code = f"import sys; print('x' * {len(long)}); print('a', end='', flush=True); print('b\\n\\nc', end='')"
    output = up.ok("run", "--node", "0,1", "--", sys.executable, "-c", code)
    for node in ("node0", "node1"):
        lines = [line.removeprefix(f"{node} | ") for line in output.split("\n") if line.startswith(node)]
        assert lines == [long, "ab", "", "c"]


def test_a_detached_program_ended_by_a_signal_without_a_name(up: Cli) -> None:
    number = signal.SIGRTMIN + 6
    output = up.ok("run", "--node", 2, "--detach", "--", "sh", "-c", f"kill -{number} $$")
    pid = output.split("pid ")[1].split(";")[0]
    deadline = time.monotonic() + 20
    while f"node2 program {pid} was ended by signal {number}" not in up.ok("logs"):
        assert time.monotonic() < deadline, up.ok("logs")
    assert json.loads(up.ok("status", "--json"))["state"] == "up"


def test_detached_programs_do_not_hold_our_output(up: Cli) -> None:
    """A pipe that is read to its end must not wait for the program."""
    began = time.monotonic()
    output = up.ok("run", "--node", 2, "--detach", "--", "sleep", 600)
    assert time.monotonic() - began < 20
    os.kill(int(output.split("pid ")[1].split(";")[0]), signal.SIGKILL)


def test_detach_what_is_not_there(up: Cli) -> None:
    done = up("run", "--node", 0, "--detach", "--", "no-such-program")
    assert done.returncode == 127
    assert "no-such-program is not found" in done.stderr
    assert "no-such-program" not in up.ok("logs")


def test_detach_with_a_large_environment(up: Cli) -> None:
    env = {f"LARGE_{i}": "x" * 100_000 for i in range(5)}
    output = up.ok("run", "--node", 1, "--detach", "--", "sh", "-c", "exec sleep 600", env=env)
    pid = int(output.split("pid ")[1].split(";")[0])
    assert Path(f"/proc/{pid}/environ").read_bytes().count(b"LARGE_") == 5
    os.kill(pid, signal.SIGKILL)


# ---- programs that would go around VMMC ----


@pytest.fixture(scope="module")
def static_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("static")
    (directory / "p.c").write_text("int main(void) { return 0; }\n")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-static", "-o", directory / "p", directory / "p.c"], check=True)
    return directory / "p"


def test_warning_for_a_static_program(up: Cli, static_program: Path) -> None:
    done = up("run", "--node", 0, "--", static_program)
    assert done.returncode == 0
    assert done.stderr.startswith(f"Warning: {static_program} is statically linked")
    assert len(done.stderr.splitlines()) == 1


def test_warning_for_a_script_of_a_static_program(up: Cli, static_program: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!{static_program}\n")
    script.chmod(0o755)
    assert "statically linked" in up("run", "--node", 0, "--", script).stderr


def test_warning_for_a_program_in_the_directory_where_it_runs(
    up: Cli, static_program: Path, tmp_path: Path
) -> None:
    there = f"./{static_program.name}"
    warned = up("run", "--node", 0, "--chdir", static_program.parent, "--", there, cwd=tmp_path)
    assert warned.stderr.startswith(f"Warning: {there} is statically linked")
    elsewhere = up("run", "--node", 0, "--chdir", tmp_path, "--", there, cwd=static_program.parent)
    assert "Warning" not in elsewhere.stderr
    assert elsewhere.returncode == 127


def test_warning_for_another_abi(up: Cli, tmp_path: Path) -> None:
    image = bytearray(Path("/bin/true").read_bytes())
    image[18:20] = (0xB7 if image[18] != 0xB7 else 0x3E).to_bytes(2, sys.byteorder)  # another machine
    foreign = tmp_path / "foreign"
    foreign.write_bytes(image)
    foreign.chmod(0o755)
    assert "is built for another ABI" in up("run", "--node", 0, "--", foreign).stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a program of another user's")
def test_warning_for_set_user_id(up: Cli, tmp_path: Path) -> None:
    program = tmp_path / "suid"
    program.write_bytes(Path("/bin/true").read_bytes())
    os.chown(program, 65534, 65534)
    program.chmod(0o755 | stat.S_ISUID)
    assert "is set-user-id" in up("run", "--node", 0, "--", program).stderr


def test_no_warning_for_ordinary_programs(up: Cli) -> None:
    for program in ("true", "sh", sys.executable):
        assert up("run", "--node", 0, "--", program, "-c", "").stderr == ""


# ---- published ports ----

ECHO = """
import socket, threading
listener = socket.create_server(("127.0.0.1", 7007))
print("ready", flush=True)
def serve(connection):
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)
        connection.sendall(b"end")
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],)).start()
"""


def published_port(line: str) -> int:
    assert line.startswith("127.0.0.1:")
    assert "leads to port 7007 of node" in line
    return int(line.split(":")[1].split(maxsplit=1)[0])


def exchange(port: int, data: bytes) -> bytes:
    def send() -> None:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)

    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        sender = threading.Thread(target=send)
        sender.start()
        received = bytearray()
        while chunk := connection.recv(1 << 20):
            received += chunk
        sender.join()
    return bytes(received)


def test_publish(up: Cli) -> None:
    program = up.popen("run", "--node", 1, "--publish", "0:7007", "--", sys.executable, "-c", ECHO)
    assert program.stdout.readline() == "ready\n"
    port = published_port(program.stderr.readline())
    data = os.urandom(5_000_000)
    assert exchange(port, data) == data + b"end"  # the end of what was sent does not end what comes back
    many = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(20)]
    for i, connection in enumerate(many):
        connection.sendall(b"%d" % i)
    for i, connection in enumerate(many):
        assert connection.recv(10) == b"%d" % i
        connection.close()
    program.terminate()
    program.communicate(timeout=20)
    assert program.returncode == 128 + signal.SIGTERM
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_publish_detached(up: Cli, running: Cluster) -> None:
    done = up("run", "--node", 2, "--detach", "--publish", "0:7007", "--", sys.executable, "-c", ECHO)
    assert done.returncode == 0, done.stderr
    running.node(2).wait_for_port(7007)
    port = published_port(done.stderr)
    assert exchange(port, b"hello") == b"helloend"
    os.kill(int(done.stdout.split("pid ")[1].split(";")[0]), signal.SIGKILL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            return
        except (ConnectionResetError, BrokenPipeError):
            continue  # just as it ended
    pytest.fail("the relay outlives its program")


def test_publish_to_more_clients_than_there_are_descriptors(up: Cli) -> None:
    """Who finds no room waits until others have left, and these go on."""
    program = up.popen("run", "--node", 1, "--publish", "0:7007", "--", sys.executable, "-c", ECHO)
    assert program.stdout.readline() == "ready\n"
    port = published_port(program.stderr.readline())
    assert exchange(port, b"before") == b"beforeend"  # it has raised its limit by then
    (relay,) = (each for each in psutil.Process(program.pid).children() if "relay" in each.cmdline()[0])
    # Two a client: it has none left when the fifth comes.
    held = {int(name) for name in os.listdir(f"/proc/{relay.pid}/fd")}
    limit = list(itertools.islice((n for n in itertools.count() if n not in held), 9))[-1]
    relay.rlimit(psutil.RLIMIT_NOFILE, (limit, limit))
    with contextlib.ExitStack() as stack:
        waiting = []
        for _ in range(20):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            connection.sendall(b"x")
            waiting.append(connection)
        answered = []
        for connection in waiting:
            # Some find room for one socket and not for the other that they need: they are reset.
            with contextlib.suppress(ConnectionResetError):
                answered.append(connection.recv(1))
                if len(answered) == 1:
                    assert connection.send(b"y") == 1
                    assert connection.recv(1) == b"y"
            connection.close()
    assert answered[0] == b"x"
    assert exchange(port, b"after") == b"afterend"
    program.terminate()
    program.communicate(timeout=20)


def test_publish_a_port_that_nobody_listens_on(up: Cli) -> None:
    program = up.popen("run", "--node", 1, "--publish", "0:7007", "--", "sleep", 600)
    port = published_port(program.stderr.readline())
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
        pytest.raises(ConnectionResetError),
    ):
        connection.recv(1)
    assert "nothing takes port 7007" in program.stderr.readline()
    program.terminate()
    program.communicate(timeout=20)


def test_publish_a_host_port_that_is_taken(up: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = up("run", "--node", 0, "--publish", f"{port}:80", "--", "echo", "ran")
    assert done.returncode == 1
    assert f"cannot publish at 127.0.0.1 port {port}" in done.stderr
    assert done.stdout == ""


def test_publish_from_a_shell_on_a_node(up: Cli) -> None:
    inner = up.command("run", "--node", 1, "--publish", "0:80", "--", "echo", "ran")
    done = up("run", "--node", 0, "--", *inner)
    assert done.returncode == 1
    assert "this shell runs on node0" in done.stderr
    assert done.stdout == ""


def test_publish_on_ipv6(up: Cli) -> None:
    program = up.popen("run", "--node", 0, "--publish", "[::1]:0:7007", "--", sys.executable, "-c", ECHO)
    assert program.stdout.readline() == "ready\n"
    line = program.stderr.readline()
    assert line.startswith("[::1]:")
    with socket.create_connection(("::1", int(line.split("]:")[1].split()[0])), timeout=20) as connection:
        connection.sendall(b"hello")
        assert connection.recv(10) == b"hello"
    program.terminate()
    program.communicate(timeout=20)
