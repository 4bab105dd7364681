"""Random sequences of socket calls on a kernel TCP pair and on a VMMC pair must agree.

A few sequences, always the same; ever new ones for VMMC_SOAK_MINUTES (`make soak`).
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmmc_emu import Cluster

CALLS = Path(__file__).parents[1] / "programs" / "calls.py"
SOAK = float(os.environ.get("VMMC_SOAK_MINUTES", "0"))
EXAMPLES = 200

# What differs on purpose, and is therefore not asked here:
#   buffer sizes        how much fits before send would block (and SO_SNDBUF, SO_RCVBUF as read back)
#   urgent data         MSG_OOB is EOPNOTSUPP
#   TCP_INFO            only the state is told
#   used once more      a socket whose connection has ended both ways can be bound anew on Linux; here not

SENDS = st.sampled_from(["send", "write", "writev", "sendmsg", "sendto"])
RECEIVES = st.sampled_from(["recv", "read", "readv", "recvmsg", "recvfrom"])
LENGTHS = st.sampled_from([0, 1, 2, 100, 1460, 2000])
MASKS = st.sampled_from(
    [0, select.POLLIN, select.POLLOUT, select.POLLRDHUP, select.POLLIN | select.POLLOUT | select.POLLRDHUP]
)
OPTIONS = [
    (socket.SOL_SOCKET, socket.SO_ERROR),
    (socket.SOL_SOCKET, socket.SO_TYPE),
    (socket.SOL_SOCKET, socket.SO_DOMAIN),
    (socket.SOL_SOCKET, socket.SO_PROTOCOL),
    (socket.SOL_SOCKET, socket.SO_ACCEPTCONN),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.SOL_SOCKET, socket.SO_RCVLOWAT),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    (socket.SOL_SOCKET, 9999),
    (socket.IPPROTO_TCP, 9999),
    (9999, 1),
]
SETTABLE: list[tuple[int, int, Any]] = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.SOL_SOCKET, socket.SO_LINGER, [1, 0]),
    (socket.SOL_SOCKET, socket.SO_LINGER, [0, 0]),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 0),
    (socket.SOL_SOCKET, socket.SO_TYPE, 1),
    (socket.SOL_SOCKET, 9999, 1),
]


def flags(*some: int) -> st.SearchStrategy[int]:
    return st.lists(st.sampled_from(some), unique=True, max_size=2).map(sum)


CALL = st.one_of(
    st.tuples(
        st.just("send"), LENGTHS, SENDS, flags(socket.MSG_NOSIGNAL, socket.MSG_DONTWAIT, socket.MSG_MORE)
    ),
    st.tuples(
        st.just("recv"), LENGTHS, RECEIVES,
        flags(socket.MSG_PEEK, socket.MSG_DONTWAIT, socket.MSG_WAITALL, socket.MSG_CMSG_CLOEXEC),
    ),
    st.tuples(st.just("shutdown"), st.sampled_from([0, 1, 2, 3, -1])),
    st.tuples(st.just("close_one")),
    st.tuples(st.just("dup")),
    st.tuples(st.just("ready"), MASKS),
    st.tuples(st.just("selected")),
    st.tuples(st.just("epolled"), MASKS),
    st.sampled_from(OPTIONS).map(lambda option: ("getsockopt", *option)),
    st.sampled_from(SETTABLE).map(lambda option: ("setsockopt", *option)),
    st.tuples(st.just("unread")),
    st.tuples(st.just("names")),
    st.tuples(st.just("again"), st.sampled_from(["listen", "accept", "bind", "connect"])),
    st.tuples(st.just("seek")),
)  # fmt: skip
SEQUENCE = st.lists(st.tuples(st.integers(0, 1), CALL).map(lambda each: [each[0], *each[1]]), max_size=25)


class Interpreter:
    """tests/programs/calls.py, somewhere."""

    def __init__(self, popen: Callable[..., subprocess.Popen[str]]) -> None:
        self.process = popen(
            [sys.executable, str(CALLS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def do(self, calls: list[Any]) -> list[Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(calls) + "\n")
        self.process.stdin.flush()
        done: list[Any] = json.loads(self.process.stdout.readline())
        return done

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def interpreters(two_nodes: Cluster) -> Iterator[tuple[Interpreter, Interpreter]]:
    """One over the kernel, one on a node."""
    both = Interpreter(subprocess.Popen), Interpreter(two_nodes.node(0).popen)
    yield both
    for each in both:
        each.end()


def agree(interpreters: tuple[Interpreter, Interpreter], calls: list[Any]) -> None:
    kernel, node = (each.do(calls) for each in interpreters)
    table = list(zip(calls, kernel, node, strict=True))
    assert kernel == node, "\n".join(
        f"{'  ' if a == b else '! '}{call}: kernel {a}, VMMC {b}" for call, a, b in table
    )


def test_calls(two_nodes: Cluster, interpreters: tuple[Interpreter, Interpreter]) -> None:
    @settings(
        max_examples=int(SOAK * 3000) or EXAMPLES, derandomize=not SOAK, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(SEQUENCE)
    def check(calls: list[Any]) -> None:
        agree(interpreters, calls)

    before = two_nodes.counters()["node0"]["bytes_received"]
    check()
    assert two_nodes.counters()["node0"]["bytes_received"] > before
