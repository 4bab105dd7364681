"""Connections that a NIC shows as made before the peer's NIC has seen them, and what becomes of them.

Both ends do what the test tells them, a line at a time, so that it knows what comes before what; processes in
the middle are stopped, so that "before" lasts.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from vmmc_emu import Cluster

# Evaluates a line at a time; `s` are its sockets by name.
END = """
import errno, os, select, socket, struct, sys
s = {}
def listen(port, backlog=128):
    s["listener"] = socket.create_server(("0.0.0.0", port), backlog=backlog)
def connect(name, port):
    s[name] = socket.create_connection(("node1", port), timeout=20)
def begin(name, port):
    s[name] = socket.socket()
    s[name].setblocking(False)
    return s[name].connect_ex(("node1", port)) in (0, errno.EINPROGRESS)
def made(name):
    poll = select.poll()
    poll.register(s[name], select.POLLOUT)
    return bool(poll.poll(0)) and s[name].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
def wait_made(name):
    return bool(select.select([], [s[name]], [], 20)[1])
def accept(name):
    s["listener"].settimeout(20)
    s[name], _ = s["listener"].accept()
    s[name].settimeout(20)
def receive_all(name):
    data = b""
    while chunk := s[name].recv(65536):
        data += chunk
    return data
def close(*names):
    for name in names:
        s.pop(name).close()
for line in sys.stdin:
    try:
        print(repr(eval(line)), flush=True)
    except OSError as error:
        print(errno.errorcode.get(error.errno, error), flush=True)
"""


class End:
    """A program on a node that does as it is told."""

    def __init__(self, cluster: Cluster, node: int) -> None:
        self.process = cluster.node(node).popen(
            [sys.executable, "-c", END], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def has_spoken(self, within: float = 0) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], within)[0])

    def heard(self) -> str:
        assert self.has_spoken(30), "no answer"
        assert self.process.stdout is not None
        return str(self.process.stdout.readline()).strip()

    def __call__(self, line: str) -> str:
        self.tell(line)
        return self.heard()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def is_asleep(pid: int) -> bool:
    """Whether it sleeps on words: a program waits for its NIC, a NIC has passed on what it was given."""
    futex_waitv = "449"
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] == futex_waitv


class Ends:
    """A client on node 0, a server on node 1 that has accepted before, and their NICs."""

    PORT = 7300

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.client, self.server = End(cluster, 0), End(cluster, 1)
        assert self.server(f"listen({self.PORT})") == "None"
        self.accepted_before()

    def accepted_before(self) -> None:
        assert self.client(f"connect('first', {self.PORT})") == "None"
        assert self.server("accept('first')") == "None"
        assert self.client("close('first')") == "None"
        assert self.server("receive_all('first')") == "b''"
        assert self.server("close('first')") == "None"

    def nic(self, node: int) -> int:
        pid = self.cluster.status()["nodes"][node]["nic_pid"]
        assert isinstance(pid, int)
        return pid

    def welcomed(self) -> int:
        count = self.cluster.node(0).counters()["connections_welcomed"]
        assert isinstance(count, int)
        return count

    @contextlib.contextmanager
    def stopped(self, node: int) -> Iterator[int]:
        """The node's NIC stands still meanwhile."""
        pid = self.nic(node)
        os.kill(pid, signal.SIGSTOP)
        try:
            while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
                pass
            yield pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@pytest.fixture
def ends() -> Iterator[Ends]:
    with Cluster(nodes=2) as cluster:
        ends = Ends(cluster)
        try:
            yield ends
        finally:
            ends.client.kill()
            ends.server.kill()


def test_connect_does_not_wait_for_the_peers_nic(ends: Ends) -> None:
    with ends.stopped(1):
        assert ends.client(f"connect('c', {ends.PORT})") == "None"
        assert ends.client("s['c'].send(b'question')") == "8"
    assert ends.welcomed() >= 1
    assert ends.server("accept('a')") == "None"
    assert ends.server("s['a'].recv(100)") == "b'question'"
    assert ends.server("s['a'].send(b'answer')") == "6"
    assert ends.client("s['c'].recv(100)") == "b'answer'"


def test_what_was_written_arrives_when_the_program_has_gone(ends: Ends) -> None:
    """It connects, writes and dies before the peer's NIC has seen any of it."""
    data = bytes(range(256)) * 100
    with ends.stopped(1):
        assert ends.client(f"connect('c', {ends.PORT})") == "None"
        assert ends.client("s['c'].send(bytes(range(256)) * 100)") == str(len(data))
        assert ends.client(f"connect('d', {ends.PORT})") == "None"
        assert ends.client("close('d')") == "None"
        ends.client.kill()
    assert ends.server("accept('a')") == "None"
    assert ends.server("receive_all('a')") == repr(data)
    assert ends.server("accept('b')") == "None"
    assert ends.server("receive_all('b')") == "b''"


@pytest.mark.parametrize("end", ["close", "half"])
def test_what_was_written_arrives_after_the_end(ends: Ends, end: str) -> None:
    with ends.stopped(1):
        assert ends.client(f"connect('c', {ends.PORT})") == "None"
        assert ends.client("s['c'].send(b'last words')") == "10"
        assert ends.client("close('c')" if end == "close" else "s['c'].shutdown(socket.SHUT_WR)") == "None"
    assert ends.server("accept('a')") == "None"
    assert ends.server("receive_all('a')") == "b'last words'"
    if end == "half":
        assert ends.server("s['a'].send(b'heard')") == "5"
        assert ends.client("s['c'].recv(100)") == "b'heard'"


@pytest.mark.parametrize("node", [0, 1])
def test_either_nic_dies_before_the_answer(ends: Ends, node: int) -> None:
    with ends.stopped(1) as pid:
        assert ends.client(f"connect('c', {ends.PORT})") == "None"
        assert ends.client(f"connect('d', {ends.PORT})") == "None"
        assert ends.client("s['c'].send(b'question'), s['d'].send(b'more'), close('d')") == "(8, 4, None)"
        old = pid if node else ends.nic(0)
        os.kill(old, signal.SIGKILL)
        while ends.cluster.status()["nodes"][node]["nic_pid"] in (None, old):
            pass
        if node == 0:  # its successor shows the same
            assert {socket.state for socket in ends.cluster.node(0).sockets()} == {"ESTAB", "FIN-WAIT"}
    got = set()
    for name in "ab":
        assert ends.server(f"accept('{name}')") == "None"
        got.add(ends.server(f"s['{name}'].recv(100)"))
        if "question" in max(got):
            ends.server(f"s['{name}'].send(b'answer')")
    assert got == {"b'question'", "b'more'"}
    assert ends.client("s['c'].recv(100)") == "b'answer'"


def test_the_listener_dies_before_it_is_asked(ends: Ends) -> None:
    """As on TCP when a listener ends with connections that nobody has accepted."""
    with ends.stopped(1):
        assert ends.client(f"connect('c', {ends.PORT})") == "None"
        assert ends.client("s['c'].send(b'question')") == "8"
        ends.server.kill()
    assert ends.client("s['c'].recv(100)") == "ECONNRESET"
    assert ends.client(f"connect('d', {ends.PORT})") == "ECONNREFUSED"


@pytest.mark.parametrize("way", ["close('listener')", "s['listener'].shutdown(socket.SHUT_RD)"])
def test_a_listener_that_was_given_up_refuses(ends: Ends, way: str) -> None:
    for _ in range(50):
        assert ends.client(f"connect('c', {ends.PORT})") == "None"
        assert ends.client("close('c')") == "None"
        assert ends.server(way) == "None"
        assert ends.client(f"connect('d', {ends.PORT})") == "ECONNREFUSED"
        assert ends.server(f"s.clear() or listen({ends.PORT})") == "None"
        ends.accepted_before()
    assert ends.welcomed() >= 50


@pytest.mark.parametrize("way", ["close('listener')", "s['listener'].shutdown(socket.SHUT_RD)"])
def test_giving_a_listener_up_waits_for_its_nic(ends: Ends, way: str) -> None:
    """Else a peer's NIC might still answer for it when the call has returned."""
    with ends.stopped(1):
        ends.server.tell(way)
        while not ends.server.has_spoken():
            if is_asleep(ends.server.process.pid):
                break
        else:
            pytest.fail("it has not waited")
    assert ends.server.heard() == "None"


@pytest.mark.parametrize(("what", "says"), [("again", "shutdown 0"), ("jump", "jumped")])
def test_a_handler_runs_when_the_listener_has_been_given_up(
    ends: Ends, program: Callable[..., str], what: str, says: str
) -> None:
    """It may make the same call, and may leave by a jump."""
    command = [program("gives_up"), "7301", what]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    process: Any = ends.cluster.node(1).popen(command, **pipes)
    assert process.stdout.readline() == "ready\n"
    with ends.stopped(1):
        process.stdin.write("\n")
        process.stdin.flush()
        while not is_asleep(process.pid):
            pass
        process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=30)[0].splitlines() == [says, "listen 0", "close 0"]


@pytest.mark.parametrize("backlog", [0, 1, 2, 7, 30])
def test_a_backlog_takes_as_many_as_before(ends: Ends, backlog: int) -> None:
    """The kernel's rule: one more than it says; the next waits for an accept."""
    assert ends.server(f"close('listener') or listen({ends.PORT}, {backlog})") == "None"
    ends.accepted_before()
    for i in range(backlog + 1):
        assert ends.client(f"connect({i}, {ends.PORT})") == "None"
    assert ends.client(f"begin('late', {ends.PORT})") == "True"
    assert ends.client("connect('none', 1)") == "ECONNREFUSED"  # answered after that
    assert ends.client("made('late')") == "False"
    assert ends.server("accept('a')") == "None"
    assert ends.client("wait_made('late')") == "True"


def test_a_node_counts_on_a_quarter_of_the_room(ends: Ends) -> None:
    """Others may count on it as well.  Who is not welcomed waits for the answer, and has it."""
    before = ends.welcomed()
    with ends.stopped(1):
        assert ends.client(f"[begin(i, {ends.PORT}) for i in range(100)]") == repr([True] * 100)
        made = ends.client("sum(made(i) for i in range(100))")
    assert int(made) == ends.welcomed() - before == 128 // 4
    assert ends.client("[wait_made(i) for i in range(100)]") == repr([True] * 100)
    assert ends.server("[accept(i) for i in range(100)].count(None)") == "100"


def test_a_smaller_backlog_holds_at_once(ends: Ends) -> None:
    assert ends.client(f"connect('c', {ends.PORT})") == "None"
    assert ends.server("s['listener'].listen(0)") == "None"
    assert ends.client(f"begin('late', {ends.PORT})") == "True"
    assert ends.client("connect('none', 1)") == "ECONNREFUSED"
    assert ends.client("made('late')") == "False"


@pytest.mark.parametrize("end", ["reset", "close"])
def test_the_room_was_gone(end: str) -> None:
    """Another node was faster: who was welcomed waits like any other, and ends as it says."""
    with Cluster(nodes=3) as cluster:
        ends, late = Ends(cluster), End(cluster, 2)
        try:
            assert ends.server(f"close('listener') or listen({ends.PORT}, 4)") == "None"
            for who in (ends.client, late):
                assert who(f"connect('first', {ends.PORT})") == "None"
                assert ends.server("accept('a') or close('a')") == "None"
                assert who("close('first')") == "None"
            with ends.stopped(1):
                # The link with node 0 is looked at before that with node 2, where all five are by then.
                assert ends.client(f"[begin(i, {ends.PORT}) for i in range(5)]") == repr([True] * 5)
                while not is_asleep(ends.nic(0)):
                    pass
                assert late(f"connect('c', {ends.PORT})") == "None"
                assert late("s['c'].send(b'late')") == "4"
            assert cluster.node(2).counters()["connections_welcomed"] == 1
            if end == "reset":
                late("s['c'].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))")
            assert late("close('c')") == "None"
            if end == "reset":
                while cluster.node(2).sockets():  # its slot and port are free again
                    pass
            for i in range(5):
                assert ends.server(f"accept({i})") == "None"
            if end == "close":
                assert ends.server("accept('late')") == "None"
                assert ends.server("receive_all('late')") == "b'late'"
        finally:
            for each in (ends.client, ends.server, late):
                each.kill()


def test_a_wire_with_a_delay_delays_connect(ends: Ends) -> None:
    """Nobody is shown as connected before the wire has carried it there and back."""
    before = ends.welcomed()
    ends.cluster.link(0, 1).set(delay="1ms")
    while not ends.cluster.link(0, 1).counters()[1, 0]["wire_changes"]:  # its NIC has been told
        pass
    assert ends.client(f"connect('c', {ends.PORT})") == "None"
    assert ends.welcomed() == before


def test_the_node_that_would_have_answered_is_gone(ends: Ends) -> None:
    with ends.stopped(1):
        assert ends.client(f"connect('c', {ends.PORT})") == "None"
        assert ends.client("s['c'].send(b'question')") == "8"
        ends.cluster.node(1).kill()
    assert ends.client("s['c'].recv(100)") == "ETIMEDOUT"


def test_a_node_without_power_welcomes_nobody(ends: Ends) -> None:
    """From the moment that `kill` returns, whatever its peers' NICs have heard."""
    with ends.stopped(0):
        killer = threading.Thread(target=ends.cluster.node(1).kill)
        killer.start()
        killer.join(20)
        assert not killer.is_alive()
        ends.client.tell(f"connect('c', {ends.PORT})")
    assert ends.client.heard() in ("EHOSTUNREACH", "ETIMEDOUT")
