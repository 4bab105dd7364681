"""Runs unittest modules, classes or tests and writes each test's outcome to a file, a line at a time.

    python outcomes.py FILE [--part I/N] [--without CLASS] NAME...

As `python3 -m unittest NAME...` does, in a network of its own where that is allowed: its loopback is fresh,
nothing lies beyond it, and the kernel's counters tell what its TCP did.  FILE has "NAME\tplanned" for every
test, "NAME\tstarted" when it starts and its outcome when it is over, so that what hangs has a name; then the
kernel's count of TCP connections.  --part runs the Ith of N parts of the classes, from 0.  This program runs
under the Python whose tests are run, on a node and off it: standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

# linux/sched.h, linux/sockios.h, linux/if.h
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


class Outcomes(unittest.TextTestResult):
    """Tells the file what becomes of each test; a test with subtests is as good as the worst of them."""

    file: TextIO

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.bad: str | None = None

    def write(self, test: unittest.TestCase, outcome: str) -> None:
        self.file.write(f"{test.id()}\t{outcome}\n")
        self.file.flush()

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.bad = None
        self.write(test, "started")

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self.write(test, self.bad or "ok")

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        super().addError(test, err)
        self.bad = "error"

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        self.bad = "failure"

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self.bad = self.bad or "skipped"

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.bad = "failure"

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addExpectedFailure(test, err)
        self.bad = "expected failure"

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        super().addUnexpectedSuccess(test)
        self.bad = "unexpected success"


def tests_in(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    """All test cases of a suite, however nested."""
    for part in suite:
        if isinstance(part, unittest.TestSuite):
            yield from tests_in(part)
        else:
            yield part


def own_network() -> bool:
    """Moves this process to a network of its own, with loopback and nothing else.  False: not permitted."""
    unshare = ctypes.CDLL(None, use_errno=True).unshare
    user = os.geteuid()
    if unshare(CLONE_NEWNET) != 0:
        if unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
            return False
        with contextlib.suppress(OSError):
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))
    return True


def kernel_connections() -> int:
    """How many TCP connections the kernel opened in this network."""
    lines = Path("/proc/self/net/snmp").read_text().splitlines()
    names, values = [line.split() for line in lines if line.startswith("Tcp:")]
    return int(dict(zip(names, values, strict=True))["ActiveOpens"])


def main() -> None:
    """See the module's text."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("file")
    arguments.add_argument("--part", default="0/1")
    arguments.add_argument("--without", action="append", default=[])
    arguments.add_argument("names", nargs="+")
    asked = arguments.parse_args()
    part, parts = map(int, asked.part.split("/"))
    alone = own_network()
    tests: dict[str, list[unittest.TestCase]] = {}
    for test in tests_in(unittest.defaultTestLoader.loadTestsFromNames(asked.names)):
        # By way of the id: a module may run a class of another one under its own name.
        tests.setdefault(test.id().rpartition(".")[0], []).append(test)
    classes = [name for name in tests if name not in asked.without][part::parts]
    with open(asked.file, "w") as Outcomes.file:
        suite = unittest.TestSuite(unittest.TestSuite(tests[name]) for name in classes)
        for test in tests_in(suite):
            Outcomes.file.write(f"{test.id()}\tplanned\n")
        unittest.TextTestRunner(resultclass=Outcomes, verbosity=2).run(suite)
        if alone:
            Outcomes.file.write(f"kernel connections\t{kernel_connections()}\n")


if __name__ == "__main__":
    main()
