"""Clusters and nodes as objects: the Python API that tests and scripts use.

    with Cluster(nodes=4) as cluster:
        server = cluster.node(0).popen(["python3", "-m", "http.server", "8000"])
        cluster.node(0).wait_for_port(8000)
        page = cluster.node(3).run(["curl", "-s", "http://node0:8000/"]).stdout

A cluster that is made this way belongs to this process: it ends with the `with` block, and also when
the process is killed.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import os
import pickle
import secrets
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

import cloudpickle

from vmmc_emu import lifecycle, links, observe, paths, processes, programs
from vmmc_emu.errors import ClusterError
from vmmc_emu.names import NODES_DEFAULT, default_cluster, node_address, node_address6, node_index, node_name
from vmmc_emu.observe import Socket

P = ParamSpec("P")
T = TypeVar("T")

Arguments = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_LOOK_FIRST_S, _LOOK_LAST_S = 0.002, 0.05  # between looks at the socket table: doubling


class Cluster:
    """A cluster: started by `start` or `with`, or one that is up already (`Cluster.running`)."""

    def __init__(
        self, nodes: int = NODES_DEFAULT, name: str | None = None, *, profile: str | None = None
    ) -> None:
        self.name = name or f"py-{os.getpid()}-{secrets.token_hex(4)}"
        self._place = paths.cluster_paths(self.name)
        self._count = nodes
        self._profile = profile  # of its links: a name or a file
        self._supervisor = 0  # pid, when we started it
        self._is_found = False  # it was up before
        self._relays: dict[int, socket.socket] = {}
        self._relays_lock = threading.Lock()

    @classmethod
    def running(cls, name: str | None = None) -> Cluster:
        """A cluster that is up, by name; ClusterError when it is not.  It is not ended by `with`."""
        place = paths.cluster_paths(name or default_cluster())
        found = cls(lifecycle.describe_running(place).nodes, place.cluster)
        found._is_found = True
        return found

    def __repr__(self) -> str:
        return f"<Cluster {self.name!r}, {self._count} nodes>"

    # ---- life ----

    def start(self) -> Cluster:
        """Starts it, and returns it when every node is ready."""
        self._supervisor = lifecycle.start(self._place, self._count, owned=True, profile=self._profile)
        return self

    def stop(self) -> None:
        """Ends its programs, NICs and daemons and removes every trace; fine when that was done."""
        with self._relays_lock:
            for control in self._relays.values():
                control.close()
            self._relays.clear()
        lifecycle.stop(self._place)
        if self._supervisor:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._supervisor, 0)
            self._supervisor = 0

    def __enter__(self) -> Cluster:
        if not self._supervisor and not self._is_found:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._supervisor:
            self.stop()

    # ---- nodes ----

    def node(self, which: int | str) -> Node:
        """One node, by index or name."""
        return Node(self, node_index(which, self._count))

    __getitem__ = node

    def __len__(self) -> int:
        return self._count

    @property
    def nodes(self) -> list[Node]:
        """All nodes, in order."""
        return [Node(self, index) for index in range(self._count)]

    # ---- links ----

    def link(self, a: int | str, b: int | str) -> links.Link:
        """The link between two nodes: what it loses, delays, cuts can be set."""
        return links.Link(self._place, node_index(a, self._count), node_index(b, self._count))

    def partition(self, *groups: str | Iterable[int | str]) -> None:
        """Splits the cluster, as in `partition([0, 1], [2, 3])`; nodes not named are one more group."""
        links.partition(self._place, links.groups_of(groups, self._count))

    def heal(self) -> None:
        """Mends every link that is down; other settings stay."""
        links.heal(self._place)

    @property
    def place(self) -> paths.ClusterPaths:
        """Where its files are."""
        return self._place

    # ---- looking ----

    def status(self) -> dict[str, Any]:
        """What `vmmc-emu status --json` prints."""
        return lifecycle.status(self._place)

    def counters(self) -> dict[str, dict[str, int]]:
        """Every node's counters, by node name."""
        return {node.name: node.counters() for node in self.nodes}

    def sockets(self) -> list[Socket]:
        """Every VMMC socket of every node."""
        return [each for node in self.nodes for each in node.sockets()]

    def programs(self, *, sockets: bool = False) -> list[dict[str, Any]]:
        """The programs that run on nodes: what `vmmc-emu ps --json` prints."""
        return observe.programs(self._place, self._count, with_sockets=sockets)

    ps = programs

    def logs(self) -> str:
        """Everything that the supervisor, daemons, NICs and detached programs have logged."""
        return "\n".join(line for log in observe.logs(self._place) for line in observe.log_lines(log))

    def relay_of(self, node: int) -> socket.socket:
        """The control socket of the relay through which this process reaches a node, started if need be."""
        with self._relays_lock:
            if node not in self._relays:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    helper = programs.relay(
                        programs.prepare(self._place, self._count, node, ["relay"]), "connect"
                    )
                    programs.detach(helper, theirs.fileno(), "relay")
                self._relays[node] = ours
            return self._relays[node]

    def forget_relay(self, node: int, control: socket.socket) -> None:
        """That relay is gone: the next connection starts another."""
        with self._relays_lock:
            if self._relays.get(node) is control:
                del self._relays[node]
                control.close()


class Node:
    """One node of a cluster."""

    def __init__(self, cluster: Cluster, index: int) -> None:
        self.cluster = cluster
        self.index = index
        self.name = node_name(index)
        self.address = node_address(index)
        self.address6 = node_address6(index)

    def __repr__(self) -> str:
        return f"<Node {self.name} of cluster {self.cluster.name!r}>"

    # ---- programs ----

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a program on this node: ours, with `extra` and its place in the cluster."""
        return programs.environment(
            self.cluster.place, self.index, len(self.cluster), {**os.environ, **(extra or {})}
        )

    def popen(
        self, arguments: Arguments, *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """subprocess.Popen on this node.  `env` is added to our own environment."""
        process = subprocess.Popen(arguments, env=self.environment(env), **options)
        processes.record(
            self.cluster.place, process.pid, processes.PROGRAM, self.index, processes.command_of(process.pid)
        )
        return process

    def run(
        self,
        arguments: Arguments,
        *,
        input: str | bytes | None = None,
        timeout: float | None = None,
        check: bool = False,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """subprocess.run on this node.

        Unless stdout, stderr or capture_output say otherwise, both are captured, as text.
        """
        if not options.keys() & {"stdout", "stderr", "capture_output"}:
            options.setdefault("text", True)
            options["capture_output"] = True
        if options.pop("capture_output", False):
            options["stdout"] = options["stderr"] = subprocess.PIPE
        if input is not None:
            options["stdin"] = subprocess.PIPE
        with self.popen(arguments, env=env, **options) as process:
            try:
                output, errors = process.communicate(input, timeout=timeout)
            except subprocess.TimeoutExpired as expired:
                process.kill()
                expired.stdout, expired.stderr = process.communicate()
                raise
            except BaseException:
                process.kill()
                raise
            finally:
                if process.poll() is not None:
                    processes.forget(self.cluster.place, processes.PROGRAM, self.index, process.pid)
        done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
        if check:
            done.check_returncode()
        return done

    def python(self, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
        """Calls a Python function in a process on this node; returns what it returns, raises what it raises.

        Functions and arguments travel by pickle; lambdas and functions defined in tests do too.
        """
        return self.submit(function, *arguments, **keywords).result()

    def submit(self, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> RemoteCall[T]:
        """Starts such a call and returns at once."""
        _ship_by_value(function)
        call = cloudpickle.dumps((function, arguments, keywords))
        request = os.memfd_create("call")
        result, theirs = os.pipe()
        try:
            data = pickle.dumps((sys.path, call))
            with open(os.dup(request), "wb") as file:
                file.write(data)
            os.lseek(request, 0, os.SEEK_SET)
            package_root = str(Path(__file__).absolute().parent.parent)
            search = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
            process = self.popen(
                [sys.executable, "-P", "-m", "vmmc_emu.nodes.call", str(request), str(theirs)],
                env={"PYTHONPATH": search},
                pass_fds=(request, theirs),
            )
        except BaseException:
            os.close(result)
            raise
        finally:
            os.close(request)
            os.close(theirs)
        return RemoteCall(self, process, result)

    def programs(self) -> list[dict[str, Any]]:
        """The programs that run on this node."""
        return [each for each in self.cluster.programs() if each["node"] == self.name]

    # ---- power ----

    def kill(self) -> None:
        """Takes its power: all its processes, programs included, end at once, and its memory is gone.

        Its peers' connections to it end with errors.
        """
        lifecycle.power_node(self.cluster.place, self.index, on=False)

    def start(self) -> None:
        """Gives it its power back, after `kill`; it is empty, and ready when this returns."""
        lifecycle.power_node(self.cluster.place, self.index, on=True)

    # ---- connections from outside ----

    def connect(self, port: int, timeout: float | None = 10.0) -> socket.socket:
        """A connection to a port of this node, as a socket that this process, outside the cluster, can use.

        It is a real socket, of the family AF_UNIX: a relay on the node joins it with a connection to the
        port.  Raises what connecting raises (ConnectionRefusedError, …); TimeoutError after `timeout`
        seconds.
        """
        for _ in range(2):  # the second time with a new relay, should somebody have killed the first
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                with theirs:
                    said = self._ask_relay(port, theirs, timeout)
            except OSError:
                ours.close()
                raise
            if said is None:
                ours.close()
                continue
            if said:
                ours.close()
                raise OSError(said, f"{self.name} port {port}: {os.strerror(said)}")
            return ours
        raise ConnectionAbortedError(f"the relay on {self.name} ends at once: cluster.logs() says why")

    def _ask_relay(self, port: int, theirs: socket.socket, timeout: float | None) -> int | None:
        """Lets the relay join a socket with a port: errno, 0: done, None: there is no relay (any more)."""
        control = self.cluster.relay_of(self.index)
        answer, answerer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with answer:
            try:
                with answerer:
                    request = json.dumps({"port": port}).encode()
                    socket.send_fds(control, [request], [theirs.fileno(), answerer.fileno()])
                answer.settimeout(timeout)
                said = answer.recv(4096)
            except TimeoutError:
                raise TimeoutError(f"no connection to {self.name} port {port} within {timeout} s") from None
            except (BrokenPipeError, ConnectionResetError):
                said = b""
        if not said:
            self.cluster.forget_relay(self.index, control)
            return None
        return int(json.loads(said)["errno"])

    def wait_for_port(self, port: int, timeout: float = 10.0) -> None:
        """Returns when a program on this node listens on the port; TimeoutError when none does in time."""
        deadline = time.monotonic() + timeout
        pause_s = _LOOK_FIRST_S
        while True:
            table = self.sockets()
            # The socket of a program that was just killed stands there until its NIC has ended it.
            if any(
                each.state == "LISTEN" and each.port == port and processes.start_of(each.pid) is not None
                for each in table
            ):
                return
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                ports = sorted({each.port for each in table if each.state == "LISTEN"})
                there = (
                    f"ports that are listened on: {', '.join(map(str, ports))}"
                    if ports
                    else "nothing listens there"
                )
                raise TimeoutError(
                    f"no program listens on port {port} of {self.name} after {timeout:g} s; {there}"
                )
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LOOK_LAST_S)

    # ---- looking ----

    def counters(self) -> dict[str, int]:
        """This node's counters by name."""
        return observe.counters(self.cluster.name, self.index)

    def sockets(self) -> list[Socket]:
        """The VMMC sockets of this node's programs."""
        return observe.sockets(self.cluster.name, self.index)

    def logs(self) -> str:
        """What this node's daemon, NIC and detached programs have logged."""
        found = observe.logs(self.cluster.place, {self.index})
        return "\n".join(line for log in found for line in observe.log_lines(log))


class RemoteCall(Generic[T]):
    """A Python function that runs on a node."""

    def __init__(self, node: Node, process: subprocess.Popen[Any], result: int) -> None:
        self.node = node
        self.process = process
        self.pid: int = process.pid
        self._descriptor: int | None = result
        self._data = bytearray()
        self._outcome: tuple[Any, ...] | None = None

    def result(self, timeout: float | None = None) -> T:
        """What the function returned; raises what it raised, TimeoutError when it still runs by then."""
        if self._outcome is None:
            self._outcome = self._receive(timeout)
        if self._outcome[0]:
            value: T = self._outcome[1]
            return value
        error: BaseException = self._outcome[1]
        if len(self._outcome) > 2 and not getattr(error, "__notes__", None):
            error.add_note(f"on {self.node.name}:\n{self._outcome[2].rstrip()}")
        raise error

    def kill(self) -> None:
        """Ends the process that makes the call."""
        self.process.kill()
        self.process.wait()

    def _receive(self, timeout: float | None) -> tuple[Any, ...]:
        assert self._descriptor is not None
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        while not self._is_whole():
            left_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            if not poll.poll(left_ms):
                raise TimeoutError(
                    f"the function on {self.node.name} (pid {self.pid}) still runs after {timeout} s"
                )
            chunk = os.read(self._descriptor, 1 << 20)
            if not chunk:
                break
            self._data += chunk
        os.close(self._descriptor)
        self._descriptor = None
        status = self.process.wait()
        processes.forget(self.node.cluster.place, processes.PROGRAM, self.node.index, self.pid)
        if not self._is_whole():
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            died = ChildProcessError(
                f"the Python process on {self.node.name} {how} before its function returned"
            )
            return False, died
        outcome: tuple[Any, ...] = pickle.loads(memoryview(self._data)[8:])
        return outcome

    def _is_whole(self) -> bool:
        return len(self._data) >= 8 and len(self._data) - 8 >= struct.unpack_from("Q", self._data)[0]

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def _ship_by_value(function: Callable[..., Any]) -> None:
    """Lets pickle carry the code of a function whose module (a test's, say) nobody else can import."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if module is None or module.__name__ == "__main__" or not getattr(module, "__file__", None):
        return  # pickle sends __main__ by value anyway
    path: Any = None
    spec = None
    name = ""
    for part in module.__name__.split("."):
        name = f"{name}.{part}" if name else part
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:
            break
        path = spec.submodule_search_locations
    if spec is None or spec.origin is None or not os.path.samefile(spec.origin, str(module.__file__)):
        cloudpickle.register_pickle_by_value(module)


__all__ = ["Cluster", "ClusterError", "Node", "RemoteCall", "Socket"]
