"""Random sequences of socket calls on kernel TCP and on a node must agree, after each call.

Both sides do a call, then both say how all sockets stand; what arrives by itself is waited for by asking
both again until they agree.  So no model of TCP is needed, and speed plays no part.

A few sequences, always the same; ever new ones for VMMC_SOAK_MINUTES (`make soak`).
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from vmmc_emu import Cluster

CALLS = Path(__file__).parents[1] / "programs" / "calls.py"
SOAK = float(os.environ.get("VMMC_SOAK_MINUTES", "0"))
EXAMPLES = 200
AGREE_S = 5.0
SOCKETS = 8

# ---- the calls ----

NUMBERS = st.integers(0, SOCKETS - 1)
FAMILIES = st.sampled_from([socket.AF_INET, socket.AF_INET, socket.AF_INET6]).map(int)
SENDS = st.sampled_from(["send", "write", "writev", "sendmsg", "sendto", "many", "sendfile"])
RECEIVES = st.sampled_from(["recv", "read", "readv", "recvmsg", "recvfrom", "many"])
LENGTHS = st.sampled_from([0, 1, 2, 100, 1460, 2000])
MASKS = st.sampled_from(
    [0, select.POLLIN, select.POLLOUT, select.POLLRDHUP, select.POLLIN | select.POLLOUT | select.POLLRDHUP]
)
EDGES = [
    0, 0, select.EPOLLET, select.EPOLLONESHOT, select.EPOLLET | select.EPOLLONESHOT, select.EPOLLEXCLUSIVE,
    select.EPOLLEXCLUSIVE | select.EPOLLET,
]  # fmt: skip
ADDRESSES = st.sampled_from(["any4", "any6", "anymapped", "4", "6", "mapped"])
# level, option, length asked for (0: an int)
OPTIONS = [
    (socket.SOL_SOCKET, socket.SO_ERROR, 0),
    (socket.SOL_SOCKET, socket.SO_TYPE, 0),
    (socket.SOL_SOCKET, socket.SO_DOMAIN, 0),
    (socket.SOL_SOCKET, socket.SO_PROTOCOL, 0),
    (socket.SOL_SOCKET, socket.SO_ACCEPTCONN, 0),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0),
    (socket.SOL_SOCKET, socket.SO_REUSEADDR, 0),
    (socket.SOL_SOCKET, socket.SO_REUSEPORT, 0),
    (socket.SOL_SOCKET, socket.SO_BROADCAST, 0),
    (socket.SOL_SOCKET, socket.SO_DONTROUTE, 0),
    (socket.SOL_SOCKET, socket.SO_OOBINLINE, 0),
    (socket.SOL_SOCKET, socket.SO_PRIORITY, 0),
    (socket.SOL_SOCKET, 29, 0),
    (socket.SOL_SOCKET, socket.SO_RCVLOWAT, 0),
    (socket.SOL_SOCKET, socket.SO_SNDLOWAT, 0),
    (socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16),
    (socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16),
    (socket.SOL_SOCKET, socket.SO_LINGER, 8),
    (socket.SOL_SOCKET, socket.SO_LINGER, 4),
    (socket.SOL_SOCKET, socket.SO_PEERCRED, 12),
    (socket.SOL_SOCKET, 9999, 0),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 0),
    (socket.IPPROTO_TCP, socket.TCP_CORK, 0),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 0),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 0),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 0),
    (socket.IPPROTO_TCP, socket.TCP_SYNCNT, 0),
    (socket.IPPROTO_TCP, socket.TCP_LINGER2, 0),
    (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 0),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0),
    (socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 0),
    (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 0),
    (socket.IPPROTO_TCP, 9999, 0),
    (socket.IPPROTO_IP, socket.IP_TOS, 0),
    (socket.IPPROTO_IP, socket.IP_TTL, 0),
    (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0),
    (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 0),
    (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 0),
    (9999, 1, 0),
]
TIMEOUT = struct.pack("ll", 3, 4000).hex()
SETTABLE: list[tuple[int, int, Any]] = [
    (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0).hex()),
    (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0).hex()),
    (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5).hex()),
    (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0).hex()),
    (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 9).hex()),
    (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 2, -1).hex()),
    (socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEOUT),
    (socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEOUT),
    (socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 3, 1000000).hex()),
    (socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", -1, 0).hex()),
    (socket.SOL_SOCKET, socket.SO_RCVTIMEO, "00"),
    (socket.SOL_SOCKET, socket.SO_RCVLOWAT, 3),
    (socket.SOL_SOCKET, socket.SO_RCVLOWAT, 150),
    (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
    (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1),
]
VALUES = st.sampled_from(
    [0, 1, 2, 5, 12, 100, 255, 256, 1000, 32767, 40000, -1, -2, "", "01", "0000", "07000000ff"]
)
# Of the first, which value is granted depends on privileges; the second is not asked here.
UNSET = {(socket.SOL_SOCKET, socket.SO_PRIORITY), (socket.IPPROTO_TCP, socket.TCP_CORK)}
SETS = st.one_of(
    st.sampled_from(SETTABLE),
    st.tuples(st.sampled_from([each[:2] for each in OPTIONS if each[:2] not in UNSET]), VALUES).map(
        lambda each: (*each[0], each[1])
    ),
)


def flags(*some: int) -> st.SearchStrategy[int]:
    return st.lists(st.sampled_from(some), unique=True, max_size=2).map(lambda each: int(sum(each)))


SEND = (LENGTHS, SENDS, flags(socket.MSG_NOSIGNAL, socket.MSG_DONTWAIT))
RECEIVE = (
    LENGTHS, RECEIVES,
    flags(
        socket.MSG_PEEK, socket.MSG_DONTWAIT, socket.MSG_WAITALL, socket.MSG_TRUNC, socket.MSG_CMSG_CLOEXEC
    ),
)  # fmt: skip
ENDLESS = flags(socket.MSG_PEEK, socket.MSG_WAITALL)
BLOCKING = st.one_of(
    st.tuples(st.just("recv"), st.tuples(st.sampled_from([1, 2, 100, 2000]), RECEIVES, ENDLESS)),
    st.tuples(st.just("recv"), st.tuples(st.sampled_from([1, 2, 100, 2000]), RECEIVES, ENDLESS)),
    st.tuples(st.just("send"), st.tuples()),
    st.tuples(st.just("accept"), st.tuples(NUMBERS)),
    st.tuples(st.just("connect"), st.tuples(NUMBERS, st.sampled_from(["4", "6"]))),
    st.tuples(st.just("poll"), st.tuples(MASKS, st.booleans())),
    st.tuples(st.just("select"), st.tuples(st.integers(0, 2))),
    st.tuples(st.just("epoll"), st.tuples(st.integers(0, 1))),
)
TIMED = st.one_of(
    st.tuples(st.just("recv"), st.tuples(LENGTHS, RECEIVES, ENDLESS)),
    st.tuples(st.just("accept"), st.tuples(NUMBERS)),
    st.tuples(st.just("send"), st.tuples()),
)


def call(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.tuples(*arguments).map(lambda values: [name, *values])


def nested(name: str, calls: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.tuples(NUMBERS, calls).map(lambda values: [name, values[0], values[1][0], *values[1][1]])


CALL = st.one_of(
    call("new", NUMBERS, FAMILIES),
    call("pair", NUMBERS, NUMBERS, FAMILIES),
    call("bind", NUMBERS, ADDRESSES, NUMBERS),
    call("listen", NUMBERS, st.sampled_from([0, 1, 5])),
    call("listen", NUMBERS, st.sampled_from([0, 1, 5])),
    call("connect", NUMBERS, NUMBERS, st.sampled_from(["4", "6", "mapped"])),
    call("connect", NUMBERS, NUMBERS, st.sampled_from(["4", "6", "any4", "any6"])),
    call("disconnect", NUMBERS),
    call("accept", NUMBERS, NUMBERS),
    call("accept", NUMBERS, NUMBERS),
    call("send", NUMBERS, *SEND),
    call("send", NUMBERS, *SEND),
    call("recv", NUMBERS, *RECEIVE),
    call("recv", NUMBERS, *RECEIVE),
    call("fill", NUMBERS),
    call("drain", NUMBERS),
    nested("block", BLOCKING),
    nested("block", BLOCKING),
    nested("timed", TIMED),
    call("shutdown", NUMBERS, st.sampled_from([0, 1, 2, 1, 3, -1])),
    call("close", NUMBERS),
    call("dup", NUMBERS),
    call("dup2", NUMBERS, NUMBERS),
    call("ready", NUMBERS, MASKS),
    call("selected", NUMBERS),
    call(
        "control", NUMBERS, st.integers(0, 1), st.sampled_from(["register", "modify", "unregister"]),
        st.tuples(MASKS, st.sampled_from(EDGES)).map(sum),
    ),
    call(
        "control", NUMBERS, st.integers(0, 1), st.just("register"),
        st.tuples(MASKS, st.sampled_from(EDGES)).map(sum),
    ),
    call("wait", NUMBERS, st.integers(0, 1)),
    call("wait", NUMBERS, st.integers(0, 1)),
    st.tuples(NUMBERS, st.sampled_from(OPTIONS)).map(lambda each: ["getsockopt", each[0], *each[1]]),
    st.tuples(NUMBERS, SETS).map(lambda each: ["setsockopt", each[0], *each[1]]),
    call("own_name", NUMBERS),
    call("peer_name", NUMBERS),
    call("ioctl", NUMBERS, st.sampled_from([termios.TIOCOUTQ, termios.FIONREAD, 0x8905, 0x5401])),
    call("status", NUMBERS),
    call("urgent", NUMBERS),
    call("seek", NUMBERS),
)  # fmt: skip
SEQUENCE = st.lists(CALL, max_size=30)
# Something of everything to begin with.
BEGIN = [
    ["pair", 0, 1, int(socket.AF_INET)],
    ["pair", 2, 3, int(socket.AF_INET6)],
    ["new", 4, int(socket.AF_INET)],
    ["listen", 4, 2],
    ["new", 5, int(socket.AF_INET)],
]


# ---- what differs ----

# What differs on purpose, each with an example of which test_differences sees that it does differ, and how:
# the calls after BEGIN, then what the last one gives over the kernel and on a node.
DIFFERENCES: dict[str, tuple[list[list[Any]], Any, Any]] = {
    # Linux binds a socket whose connection has ended, though nothing can be done with it then.
    "bind after an end": ([["disconnect", 1], ["bind", 0, "any4", 0]], 0, "EINVAL"),
    # A socket keeps its port until it is closed, not until its connection has ended.
    "bind to an ended socket's port": ([["disconnect", 1], ["bind", 5, "any4", 0]], 0, "EADDRINUSE"),
}
# Nor is asked here: sizes of buffers (how much a full socket took, when a half empty one is writable again,
# SO_SNDBUF, SO_RCVBUF), what MSG_MORE and TCP_CORK hold back (TCP for 0.2 s, VMMC nothing), sending urgent
# data (EOPNOTSUPP), TCP_INFO but for the state, a socket that connects to itself, and a blocking receive of
# 0 bytes (which on Linux ends with whatever happens).  Nor for ports in
# TIME_WAIT, which a node does not have.


def on_purpose(what: list[Any], kernel: Any, node: Any, before: list[str]) -> str:
    """The name of a difference that is on purpose: what follows such a call is not compared.  "" none."""
    # Which ports are in TIME_WAIT depends on all that ran before; tests/programs/ports.py asks the rest.
    if what[0] == "bind" and kernel == "EADDRINUSE" and node == 0:
        return "bind to a port in TIME_WAIT"
    if what[0] == "bind" and kernel in (0, "EADDRINUSE") and node == "EINVAL":
        return "bind after an end" if "state 7" in before[what[1]] else ""
    if what[0] == "bind" and kernel == 0 and node == "EADDRINUSE" and "state 7" in before[what[3]]:
        return "bind to an ended socket's port"
    return ""



# ---- the two sides ----


class Interpreter:
    """tests/programs/calls.py, somewhere; started anew when it died."""

    def __init__(self, popen: Callable[..., subprocess.Popen[str]]) -> None:
        self.popen = popen
        self.begin()

    def begin(self) -> None:
        self.process = self.popen(
            [sys.executable, str(CALLS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def tell(self, what: list[Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")

    def answer(self) -> tuple[Any, list[str]]:
        """What came of it, and how the sockets stand."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.end()
            status = self.process.returncode
            self.begin()
            return f"died ({status})", []
        result, stands = json.loads(line)
        return result, stands

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


Both = tuple[Interpreter, Interpreter]


@pytest.fixture(scope="module")
def interpreters(two_nodes: Cluster) -> Iterator[Both]:
    """One over the kernel, one on a node."""
    both = Interpreter(subprocess.Popen), Interpreter(two_nodes.node(0).popen)
    yield both
    for each in both:
        each.end()


def ask(interpreters: Both, what: list[Any]) -> list[tuple[Any, list[str]]]:
    for each in interpreters:
        each.tell(what)
    return [each.answer() for each in interpreters]


def step(interpreters: Both, what: list[Any]) -> tuple[Any, Any, list[str], str]:
    """Both results, how the sockets stand, and what differs in that, "" nothing."""
    (kernel, here), (node, there) = ask(interpreters, what)
    deadline = time.monotonic() + AGREE_S
    while here != there and time.monotonic() < deadline:
        (_, here), (_, there) = ask(interpreters, ["look"])
    if not here or not there:
        return kernel, node, here, "died"
    pairs = enumerate(zip(here, there, strict=True))
    return kernel, node, here, "; ".join(f"{n}: kernel {a}, VMMC {b}" for n, (a, b) in pairs if a != b)


def agree(interpreters: Both, calls: list[list[Any]]) -> None:
    table, differs, before = [], False, [""] * SOCKETS
    try:
        for each in BEGIN + calls:
            kernel, node, stand, difference = step(interpreters, each)
            if on_purpose(each, kernel, node, before):
                break
            differs = kernel != node or bool(difference)
            told = str(kernel) if kernel == node else f"kernel {kernel}, VMMC {node}"
            table.append(f"{'!' if differs else ' '} {each}: {told}{difference and '; then '}{difference}")
            if differs:
                break
            before = stand
    finally:
        (kernel, _), (node, _) = ask(interpreters, ["end"])
    if kernel or node:
        table.append(f"! threads that could not be woken: kernel {kernel}, VMMC {node}")
        differs = True
    assert not differs, "\n" + "\n".join(table)


PEEK_ALL = int(socket.MSG_PEEK | socket.MSG_WAITALL)
# Each once differed.
EXAMPLES_BY_NAME: dict[str, list[list[Any]]] = {
    "shutdown wakes who polls": [["block", 0, "poll", 0, True], ["shutdown", 0, socket.SHUT_RDWR]],
    "shutdown of what is not connected": [
        ["shutdown", 5, socket.SHUT_RD], ["recv", 5, 10, "recv", 0],
        ["shutdown", 5, socket.SHUT_WR], ["ready", 5, 5],
    ],
    "disconnect leaves an error": [
        ["disconnect", 0], ["getsockopt", 0, socket.SOL_SOCKET, socket.SO_ERROR, 0],
    ],
    "disconnect after both ends leaves none": [
        ["send", 0, 2, "send", 0], ["shutdown", 0, socket.SHUT_WR], ["shutdown", 1, socket.SHUT_WR],
        ["disconnect", 1], ["recv", 0, 1, "recv", 0],
    ],
    "disconnect ends a blocked receive": [["block", 0, "recv", 10, "recv", 0], ["disconnect", 0]],
    "disconnect ends a blocked send": [["block", 0, "send"], ["disconnect", 1]],
    "disconnect tells a poller of the error": [["block", 0, "poll", 0, True], ["disconnect", 0]],
    "a new connection has no old error": [["disconnect", 0], ["connect", 0, 4, "4"]],
    "disconnect forgets the address": [
        ["disconnect", 0], ["own_name", 0], ["disconnect", 1], ["own_name", 1],
    ],
    "a wildcard is one again": [
        ["bind", 5, "any4", 5], ["connect", 5, 4, "4"], ["own_name", 5], ["disconnect", 5], ["own_name", 5],
    ],
    "a refused connect keeps its port": [
        ["shutdown", 4, socket.SHUT_RD], ["block", 5, "connect", 4, "4"], ["own_name", 5],
    ],
    "receive of nothing times out": [["timed", 0, "recv", 0, "recv", 0]],
    "options out of range": [
        ["setsockopt", 0, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 0],
        ["setsockopt", 0, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, -1],
        ["setsockopt", 0, socket.IPPROTO_IP, socket.IP_TTL, 0],
        ["setsockopt", 0, socket.IPPROTO_IP, socket.IP_TTL, -1],
    ],
    "an error after part of a send is still there": [
        ["dup2", 0, 3], ["timed", 2, "send"], ["getsockopt", 2, socket.SOL_SOCKET, socket.SO_ERROR, 0],
    ],
    "what came in time is received": [
        ["send", 0, 100, "send", 0], ["timed", 1, "recv", 1000, "recv", PEEK_ALL],
        ["setsockopt", 1, socket.SOL_SOCKET, socket.SO_RCVLOWAT, 200], ["timed", 1, "recv", 1000, "recv", 0],
    ],
    "sendfile to a listening socket": [["send", 4, 1, "sendfile", 0]],
    "urgent data of a listening socket": [["urgent", 4]],
    "options of odd lengths": [
        ["setsockopt", 0, socket.IPPROTO_IP, socket.IP_TOS, ""],
        ["setsockopt", 0, socket.IPPROTO_TCP, 9999, "01"],
        ["setsockopt", 0, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, "01"],
    ],
    "options too late": [["setsockopt", 0, socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 2]],
    "options of another family": [["getsockopt", 0, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0]],
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES_BY_NAME)
def test_named(interpreters: Both, name: str) -> None:
    agree(interpreters, EXAMPLES_BY_NAME[name])


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences(interpreters: Both, name: str) -> None:
    """The list of what differs is exact."""
    calls, kernel, node = DIFFERENCES[name]
    for _ in range(5):  # over the kernel the port may happen to be one in TIME_WAIT
        for each in BEGIN + calls:
            told = [result for result, _ in ask(interpreters, each)]
        ask(interpreters, ["end"])
        if told != ["EADDRINUSE", node]:
            break
    assert told == [kernel, node]


def test_calls(two_nodes: Cluster, interpreters: Both) -> None:
    @settings(
        # Not made shorter: each that differs takes AGREE_S, and the table of calls says enough.
        max_examples=EXAMPLES, derandomize=not SOAK, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(SEQUENCE)
    def check(calls: list[list[Any]]) -> None:
        agree(interpreters, calls)

    end = time.monotonic() + SOAK * 60
    before = two_nodes.counters()["node0"]["bytes_received"]
    check()
    while time.monotonic() < end:
        check()
    assert two_nodes.counters()["node0"]["bytes_received"] > before
