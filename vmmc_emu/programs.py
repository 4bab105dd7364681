"""Running programs on nodes: their environment, in the foreground, on many nodes at once, detached."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from vmmc_emu import binaries, lifecycle, paths, power, processes
from vmmc_emu.errors import ClusterError
from vmmc_emu.loop import Loop
from vmmc_emu.names import node_name
from vmmc_emu.paths import ClusterPaths

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # exit statuses, as shells give them

_GRACE_S = processes.GRACE_S


def environment(
    place: ClusterPaths,
    node: int,
    nodes: int,
    base: Mapping[str, str] | None = None,
    *,
    diagnose: bool = False,
) -> dict[str, str]:
    """The environment of a program on a node: `base`, ours if None, with its place in the cluster."""
    if not power.read(place, node).on:
        raise ClusterError(lifecycle.is_off(place, node))
    found = dict(os.environ if base is None else base)
    found["VMMC_CLUSTER"] = place.cluster
    found["VMMC_NODE"] = node_name(node)
    found["VMMC_NODES"] = str(nodes)
    found["VMMC_SOCKET"] = str(place.socket(node))
    found["VMMC_PLACED"] = "1"  # also where somebody on another node asks: see preload/process.c
    library = str(paths.native_file("libvmmc-preload.so"))
    others = [item for item in found.get("LD_PRELOAD", "").replace(":", " ").split() if item != library]
    found["LD_PRELOAD"] = ":".join([library, *others])
    processes.switch_fast(found)
    if diagnose:
        found["VMMC_DIAGNOSTICS"] = "1"
    return found


@dataclass(frozen=True)
class Program:
    """What is to run on one node."""

    place: ClusterPaths
    node: int
    arguments: list[str]
    environment: dict[str, str]
    directory: Path | None = None  # where; None: here

    @property
    def command(self) -> str:
        """Its command line as one line."""
        return " ".join(self.arguments)


def prepare(
    place: ClusterPaths,
    nodes: int,
    node: int,
    arguments: Sequence[str],
    *,
    directory: str | None = None,
    diagnose: bool = False,
) -> Program:
    """Puts the node's name for {node} in the arguments and the directory, and makes the directory."""
    name = node_name(node)
    where = None
    if directory is not None:
        where = Path(directory.replace("{node}", name)).absolute()
        try:
            where.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClusterError(f"cannot make the directory {where}: {error.strerror}") from None
    words = [argument.replace("{node}", name) for argument in arguments]
    return Program(place, node, words, environment(place, node, nodes, diagnose=diagnose), where)


def warnings(program: Program) -> list[str]:
    """Why this program would go around VMMC, as sentences; empty: it would not, as far as one can see."""
    name, search_path = program.arguments[0], program.environment.get("PATH")
    # A relative path is looked up where the program is to run.
    where = os.path.join(program.directory or "", name) if "/" in name else name
    found = binaries.find_program(where, search_path)
    if found is None:
        return []
    return [
        f"{name} {why}: its connections go to the kernel's network"
        for why in binaries.bypasses(found, search_path)
    ]


def _spawn(program: Program, actions: Iterable[tuple[int, ...]], *, own_group: bool) -> int:
    """Starts a program as our child and writes down that it is the cluster's."""
    executable = program.arguments[0]
    if program.directory is not None:
        os.chdir(program.directory)
    found = binaries.find_program(executable, program.environment.get("PATH"))
    extra: dict[str, Any] = {"setpgroup": 0} if own_group else {}
    pid = os.posix_spawn(
        # Without a file to run, the system's own error for the name as it was given.
        found or (executable if "/" in executable else f"/nonexistent/{executable}"),
        program.arguments,
        program.environment,
        file_actions=list(actions),
        setsigmask=(),
        # The interpreter ignores these; programs expect the default.
        setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
        **extra,
    )
    processes.record(program.place, pid, processes.PROGRAM, program.node, program.command)
    return pid


def start_status(program: Program, error: OSError) -> tuple[int, str]:
    """Exit status and text for a program that could not be started."""
    name = program.arguments[0]
    path = program.environment.get("PATH")
    # execvp says EACCES, too, where a directory of PATH may not be searched and no other has the program.
    hidden = error.errno == errno.EACCES and "/" not in name and not binaries.find_program(name, path)
    if error.errno == errno.ENOENT or hidden:
        return NOT_FOUND, f"{name} is not found: give its path, or install it"
    return NOT_EXECUTABLE, f"{name} cannot be started: {error.strerror}"


class NotStarted(ClusterError):
    """A program could not be started; `status` is what a shell would exit with."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _raise_not_started(program: Program, error: OSError) -> NoReturn:
    raise NotStarted(*start_status(program, error)) from None


# ---- one, in the foreground ----

_FORWARDED = {
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
    signal.SIGALRM, signal.SIGCONT, signal.SIGTSTP, signal.SIGWINCH,
}  # fmt: skip


def run_foreground(program: Program, started: Callable[[int], None] | None = None) -> int:
    """Runs a program with our descriptors and terminal; returns its exit status, 128 + n for signal n.

    It shares our process group, so the terminal's signals reach it by themselves; what somebody sends to
    us alone (kill) is passed on.  `started` is called with its pid.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED | {signal.SIGCHLD})
    try:
        try:
            pid = _spawn(program, (), own_group=False)
        except OSError as error:
            _raise_not_started(program, error)
        try:
            if started:
                started(pid)
            return _wait_forwarding(pid)
        finally:
            processes.forget(program.place, processes.PROGRAM, program.node, pid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _wait_forwarding(pid: int) -> int:
    while True:
        information = signal.sigwaitinfo(_FORWARDED | {signal.SIGCHLD})
        if information.si_signo != signal.SIGCHLD:
            if information.si_code <= 0:  # from a process; positive: from the kernel, to the whole group
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, information.si_signo)
            continue
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if not found:
            continue  # another child of ours
        if os.WIFSTOPPED(status):
            os.kill(os.getpid(), signal.SIGSTOP)  # as the shell expects of the job; it continues both
            continue
        return exit_status(status)


def exit_status(status: int) -> int:
    """A wait status as shells count: 128 + n for signal n."""
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


# ---- many at once ----


@dataclass
class _Stream:
    """One program's output, split into lines."""

    node: int
    descriptor: int
    error: bool
    begun: list[bytes] = field(default_factory=list)  # the line that has no end yet, in pieces


def run_everywhere(programs: Sequence[Program], write: Callable[[int, bytes, bool], None]) -> int:
    """Runs programs side by side; returns the exit status of the first that failed, 0 when none did.

    write(node, line, error): takes each line of output as it comes, with its end; error: of standard
    error.  SIGINT, SIGTERM or SIGHUP end all of them: asked first, forced after a grace.
    """
    loop = Loop()
    # Each program leads a process group.  Those that have ended are reaped last, so that until then the
    # numbers of their groups, in which they may have left others, are nobody else's.
    groups: list[int] = []
    running: dict[int, Program] = {}
    streams: set[int] = set()
    failed: list[int] = []
    asked: list[signal.Signals] = []
    forced = False

    def take(stream: _Stream) -> None:
        data = os.read(stream.descriptor, 65536)
        *ends, rest = data.split(b"\n")
        for end_of_line in ends:
            write(stream.node, b"".join([*stream.begun, end_of_line, b"\n"]), stream.error)
            stream.begun.clear()
        if rest:
            stream.begun.append(rest)
        if not data:
            if stream.begun:
                write(stream.node, b"".join([*stream.begun, b"\n"]), stream.error)
            loop.unwatch(stream.descriptor)
            os.close(stream.descriptor)
            streams.discard(stream.descriptor)
            finish()

    def finish() -> None:
        if running:
            return
        if not streams or forced:  # what left its group and still holds the output is not waited for
            loop.stop()
        elif asked:
            # Only what programs left in the background holds their output; shells let it ignore SIGINT.
            send(signal.SIGTERM)

    def reap() -> None:
        for pid in list(running):
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None:
                continue
            program = running.pop(pid)
            processes.forget(program.place, processes.PROGRAM, program.node, pid)
            if found.si_status:
                failed.append(found.si_status + (0 if found.si_code == os.CLD_EXITED else 128))
        finish()

    def send(number: signal.Signals) -> None:
        for group in groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)

    def force() -> None:
        nonlocal forced
        forced = True
        send(signal.SIGKILL)
        finish()

    def end(number: signal.Signals) -> None:
        again = number in asked  # then people mean it
        if not asked:
            loop.call_later(_GRACE_S, lambda: send(signal.SIGTERM))
            loop.call_later(2 * _GRACE_S, force)
        asked.append(number)
        send(number)
        if again:
            force()
        else:
            finish()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.on_signal(number, lambda number=number: end(number))  # type: ignore[misc]
    loop.on_signal(signal.SIGCHLD, reap)
    here = Path.cwd()
    try:
        for program in programs:
            ends = [os.pipe(), os.pipe()]
            try:
                pid = _spawn(
                    program,
                    [
                        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),  # type: ignore[list-item]
                        (os.POSIX_SPAWN_DUP2, ends[0][1], 1),
                        (os.POSIX_SPAWN_DUP2, ends[1][1], 2),
                    ],
                    own_group=True,
                )
            except OSError as error:
                send(signal.SIGKILL)
                _raise_not_started(program, error)
            finally:
                os.chdir(here)
                for _, theirs in ends:
                    os.close(theirs)
            groups.append(pid)
            running[pid] = program
            for (ours, _), is_error in zip(ends, (False, True), strict=True):
                streams.add(ours)
                stream = _Stream(program.node, ours, is_error)
                loop.watch(ours, lambda stream=stream: take(stream))  # type: ignore[misc]
        loop.run()
    finally:
        for program_pid, program in running.items():
            processes.forget(program.place, processes.PROGRAM, program.node, program_pid)
        for group in groups:
            os.waitpid(group, 0 if group not in running else os.WNOHANG)
    if failed:
        return failed[0]
    return 128 + asked[0] if asked else 0


# ---- detached ----


def open_log(place: ClusterPaths, node: int, program: str) -> tuple[int, Path]:
    """Makes the file for a detached program's output: node3.redis-server.log, …-2.log, …"""
    base = re.sub(r"[^A-Za-z0-9_+-]", "_", os.path.basename(program)) or "program"
    for number in range(1, 1 << 30):
        suffix = "" if number == 1 else f"-{number}"
        path = place.logs / f"{node_name(node)}.{base}{suffix}.log"
        try:
            return os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600
            ), path
        except FileExistsError:
            continue
    raise ClusterError(f"no name is left for a log of {program}")


def no_room_for_logs(place: ClusterPaths) -> str | None:
    """Says that output of detached programs would be lost now, for want of room; None: it would not."""
    import tempfile  # noqa: PLC0415  only what is detached needs it

    try:
        with tempfile.TemporaryFile(dir=place.logs, buffering=0) as file:
            file.write(bytes(resource.getpagesize()))
    except OSError as error:
        return f"{place.logs}: {error.strerror}: output is lost until some space is free there"
    return None


def detach(program: Program, standard_input: int | None = None, name: str | None = None) -> tuple[int, Path]:
    """Starts a program that outlives us, child of the cluster's supervisor; its pid and its log."""
    output, log = open_log(program.place, program.node, name or program.arguments[0])
    try:
        pid = detach_with(program, output, standard_input)
    except OSError:
        log.unlink(missing_ok=True)
        raise
    finally:
        os.close(output)
    return pid, log


def detach_with(program: Program, output: int, standard_input: int | None = None) -> int:
    """The same with the output going to a descriptor of the caller's."""
    umask = os.umask(0)
    os.umask(umask)
    wanted = {
        "arguments": program.arguments,
        "environment": program.environment,
        "directory": os.fspath(program.directory or Path.cwd()),
        "umask": umask,
        "limits": [(number, resource.getrlimit(number)) for number in _LIMITS],
    }
    description = os.memfd_create("program")
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        data = json.dumps(wanted).encode("utf-8", "surrogateescape")
        os.pwrite(description, data, 0)
        answer = lifecycle.ask_supervisor(
            program.place,
            {"node": program.node},
            [description, nothing if standard_input is None else standard_input, output],
        )
    finally:
        os.close(description)
        os.close(nothing)
    if "pid" in answer:
        return int(answer["pid"])
    if not answer["errno"]:
        raise ClusterError(answer["message"])
    _raise_not_started(program, OSError(answer["errno"], answer["message"]))


_LIMITS = sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")})


# ---- ports that the host can reach ----


@dataclass(frozen=True)
class Publication:
    """A port of the host's that leads to one of a node's."""

    address: str
    host_port: int  # 0: any that is free
    node_port: int

    @classmethod
    def parse(cls, text: str) -> Publication:
        """Reads HOST:NODE or ADDRESS:HOST:NODE, as in 8080:80, 0.0.0.0:8080:80 and [::1]:8080:80."""
        found = re.fullmatch(r"(?:(\[[0-9a-fA-F:.]+\]|[^:\[\]]+):)?(\d{1,5}):(\d{1,5})", text)
        if not found or not (int(found[2]) < 65536 and 0 < int(found[3]) < 65536):
            raise ClusterError(
                f"{text!r} is not HOST:NODE or ADDRESS:HOST:NODE: write 8080:80 to reach the node's port 80"
                " at port 8080 of this machine's 127.0.0.1"
            )
        return cls((found[1] or "127.0.0.1").strip("[]"), int(found[2]), int(found[3]))

    def listen(self) -> socket.socket:
        """The listening socket, of the kernel's TCP: the relay on the node inherits it."""
        if "libvmmc-preload.so" in os.environ.get("LD_PRELOAD", "") and "VMMC_SOCKET" in os.environ:
            raise ClusterError(
                f"this shell runs on {os.environ.get('VMMC_NODE')}, where every port is the node's:"
                " publish from a shell of the host"
            )
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.address, self.host_port))
            listener.listen(1024)
        except OSError as error:
            listener.close()
            raise ClusterError(
                f"cannot publish at {self.address} port {self.host_port}: {error.strerror};"
                " choose another host port, or 0 for any"
            ) from None
        return listener


def relay(program: Program, *arguments: str) -> Program:
    """The relay (vmmc_emu.nodes.relay) on the node of a program."""
    package_root = str(Path(__file__).absolute().parent.parent)
    path = os.pathsep.join(filter(None, (package_root, program.environment.get("PYTHONPATH"))))
    words = [sys.executable, "-P", "-m", "vmmc_emu.nodes.relay", *arguments]
    return Program(program.place, program.node, words, {**program.environment, "PYTHONPATH": path}, Path("/"))


def publish_foreground(program: Program, pid: int, publication: Publication, listener: socket.socket) -> int:
    """Starts the relay of a program that runs in the foreground: it ends with that program."""
    helper = relay(program, "publish", str(publication.node_port), str(pid))
    here = Path.cwd()
    try:
        return _spawn(helper, [(os.POSIX_SPAWN_DUP2, listener.fileno(), 0)], own_group=True)
    finally:
        os.chdir(here)


def publish_detached(
    program: Program, pid: int, publication: Publication, listener: socket.socket, log: Path
) -> int:
    """The same for a detached program; the relay's complaints go to the program's log."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        return detach_with(
            relay(program, "publish", str(publication.node_port), str(pid)), output, listener.fileno()
        )
    finally:
        os.close(output)
