"""Runs unittest classes and writes each test's outcome to a file, a line at a time.

    python outcomes.py FILE MODULE.CLASS...     runs them
    python outcomes.py --list FILE MODULE...    writes the names of the classes that have tests

A line is written when a test starts ("NAME\tstarted") and when it is over, so that what hangs has a name.
This program runs under the Python whose tests are run, on a node and off it: standard library only.
"""

from __future__ import annotations

import sys
import unittest
from collections.abc import Iterator
from typing import Any, TextIO


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
        if not hasattr(test, "_testMethodName"):  # setUpClass or setUpModule failed: no test is started
            self.write(test, "error")

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        self.bad = "failure"

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self.bad = self.bad or "skipped"
        if not hasattr(test, "_testMethodName"):
            self.write(test, "skipped")

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


def main() -> None:
    """See the module's text."""
    if sys.argv[1] == "--list":
        _, _, path, *modules = sys.argv
        suite = unittest.defaultTestLoader.loadTestsFromNames(modules)
        # By way of the id: a module may run a class of another one under its own name.
        names = dict.fromkeys(test.id().rpartition(".")[0] for test in tests_in(suite))
        with open(path, "w") as file:
            file.writelines(f"{name}\n" for name in names)
        return
    _, path, *names_to_run = sys.argv
    with open(path, "w") as Outcomes.file:
        suite = unittest.defaultTestLoader.loadTestsFromNames(names_to_run)
        unittest.TextTestRunner(resultclass=Outcomes, verbosity=2).run(suite)


if __name__ == "__main__":
    main()
