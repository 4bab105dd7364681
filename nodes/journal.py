"""The log of a supervisor or daemon: one line an event, with its level, and no flood of like ones.

Of each kind of event some lines are written in any ten seconds; what follows is counted, and the count is
written when the time is over, with the newest of them, so that the log's last word on something is true.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

INFO, WARNING, ERROR = "info", "warning", "error"

_MOST, _WINDOW_S = 40, 10.0
_NUMBERS = re.compile(r"\d+")


@dataclass
class _Kind:
    """Events whose lines begin alike but for numbers."""

    began: float
    count: int = 0
    level: str = INFO  # of the newest that was not written,
    newest: str = ""  # and what it says


_kinds: dict[str, _Kind] = {}
_later: list[Callable[[float, Callable[[], None]], None]] = []


def begin(call_later: Callable[[float, Callable[[], None]], None]) -> None:
    """Names the event loop's way of calling back, by which counts are written in time."""
    _later[:] = [call_later]


def log(level: str, text: str) -> None:
    """Writes one event to standard error, the process's log file."""
    now = time.monotonic()
    name = _NUMBERS.sub("#", text[:48])
    kind = _kinds.get(name)
    if kind is None or now - kind.began >= _WINDOW_S:
        _tell(name)
        kind = _kinds[name] = _Kind(now)
    kind.count += 1
    if kind.count <= _MOST:
        _write(level, text)
        return
    kind.level, kind.newest = level, text
    if kind.count == _MOST + 1:
        for call_later in _later:
            call_later(kind.began + _WINDOW_S - now, lambda: _tell(name))


def _tell(name: str) -> None:
    """Writes how many of a kind were not written, if any."""
    kind = _kinds.pop(name, None)
    if kind is not None and kind.count > _MOST:
        many = f"{kind.count - _MOST} more lines like this were suppressed"
        _write(kind.level, f"{many}, the newest: {kind.newest}")


def _write(level: str, text: str) -> None:
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    line = " ".join(text.split("\n"))
    with contextlib.suppress(OSError):  # a full disk must not stop a node
        os.write(2, f"{stamp}.{int(now * 1000) % 1000:03d}Z {level} {line}\n".encode(errors="replace"))
