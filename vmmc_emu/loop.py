"""The event loop of supervisor, daemons and `run`: descriptors, signals, one-shot timers; idle, it sleeps."""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable

Callback = Callable[[], None]

_FAILURES_MOST, _FAILURES_S = 100, 10.0


class Loop:
    """Calls back when a descriptor is readable or writable, a signal came or a time is reached."""

    def __init__(self, failed: Callable[[Exception], None] | None = None) -> None:
        """`failed` is told of what callbacks raise, and the loop goes on; None: run() raises it."""
        self._failed = failed
        self._failures: deque[float] = deque(maxlen=_FAILURES_MOST)
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callback]] = []
        self._sequence = itertools.count()
        self._signals: dict[int, Callback] = {}
        self._running = False
        self._signal_read, self._signal_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._signal_write, warn_on_full_buffer=False)
        self.watch(self._signal_read, self._take_signals)

    def watch(self, descriptor: int, readable: Callback, writable: Callback | None = None) -> None:
        """Sets what to call for a descriptor; `writable` None: nobody asks for that."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writable else 0)
        if descriptor in self._selector.get_map():
            self._selector.modify(descriptor, events, (readable, writable))
        else:
            self._selector.register(descriptor, events, (readable, writable))

    def unwatch(self, descriptor: int) -> None:
        """Forgets a descriptor: before it is closed."""
        if descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)

    def on_signal(self, number: signal.Signals, callback: Callback) -> None:
        """Calls back, from the loop, after a signal."""
        self._signals[number] = callback
        signal.signal(number, _noted)

    def call_later(self, delay_s: float, callback: Callback) -> None:
        """Calls back once after a time."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._sequence), callback))

    def stop(self) -> None:
        """Makes run() return."""
        self._running = False

    def run(self) -> None:
        """Works until stop() is called."""
        self._running = True
        while self._running:
            timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            for key, events in self._selector.select(timeout):
                readable, writable = key.data
                if events & selectors.EVENT_WRITE and writable:
                    self._call(writable)
                # The same round may have forgotten it, or given its number to somebody else.
                current = self._selector.get_map().get(key.fd)
                if events & selectors.EVENT_READ and current is not None and current.data[0] is readable:
                    self._call(readable)
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                self._call(heapq.heappop(self._timers)[2])

    def _call(self, callback: Callback) -> None:
        if self._failed is None:
            callback()
            return
        try:
            callback()
        except Exception as error:
            now = time.monotonic()
            self._failures.append(now)
            if len(self._failures) == _FAILURES_MOST and now - self._failures[0] < _FAILURES_S:
                raise  # it fails over and over: a successor may do better
            self._failed(error)

    def _take_signals(self) -> None:
        for number in dict.fromkeys(os.read(self._signal_read, 4096)):
            if callback := self._signals.get(number):
                self._call(callback)


def _noted(_number: int, _frame: object) -> None:
    """The interpreter has written the signal's number to the wake-up pipe: that is all."""
