"""Follows log files as they grow: the kernel tells of changes (inotify), nothing is polled."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
from collections.abc import Iterator

from vmmc_emu import observe
from vmmc_emu.observe import Log
from vmmc_emu.paths import ClusterPaths

_IN_MODIFY, _IN_CREATE, _IN_DELETE_SELF = 0x2, 0x100, 0x400


def _watch(directory: str) -> int:
    """A descriptor that becomes readable when a file in the directory is made or grows."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.inotify_init1(os.O_CLOEXEC))
    mask = _IN_MODIFY | _IN_CREATE | _IN_DELETE_SELF
    if descriptor < 0 or libc.inotify_add_watch(descriptor, os.fsencode(directory), mask) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot watch {directory}: {os.strerror(code)}")
    return descriptor


@contextlib.contextmanager
def _signals(poll: select.poll) -> Iterator[None]:
    """Lets a poll end also for a signal that comes just before it: Python's handler waits for it to end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    ours, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    try:
        poll.register(ours, select.POLLIN)
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(ours)
        os.close(theirs)


def _wait(descriptor: int) -> None:
    """Returns once it is readable, or a signal came whose handler raised nothing."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    with _signals(poll):
        ready = dict(poll.poll())
    if descriptor in ready:
        os.read(descriptor, 65536)


def follow(place: ClusterPaths, nodes: set[int] | None = None, level: str = "info") -> Iterator[str]:
    """The lines of the logs, of that level and above, those to come included, until the cluster is down."""
    descriptor = _watch(os.fspath(place.logs))
    positions: dict[Log, int] = {}
    rests: dict[Log, bytes] = {}
    try:
        while True:
            for log in observe.logs(place, nodes):
                try:
                    with open(log.path, "rb") as file:
                        file.seek(positions.get(log, 0))
                        data = rests.get(log, b"") + file.read()
                        positions[log] = file.tell()
                except FileNotFoundError:
                    continue
                *lines, rests[log] = data.split(b"\n")
                for data in lines:
                    line = data.decode("utf-8", "replace")
                    if observe.is_wanted(log, line, level):
                        yield f"{observe.log_prefix(log)} | {line}"
            if not place.logs.exists():
                return
            _wait(descriptor)
    finally:
        os.close(descriptor)
