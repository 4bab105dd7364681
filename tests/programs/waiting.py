"""Threads that block in readiness calls, and what must wake each of them.  Ends with 0: all were woken."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator

TIMEOUT_S = 20.0  # a lost wake-up ends in a failure, not in a hang


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connected pair of stream sockets."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        server, _ = listener.accept()
        with server:
            yield client, server


def asleep(thread: threading.Thread) -> bool:
    """True once the thread sleeps in the kernel."""
    with open(f"/proc/self/task/{thread.native_id}/stat", encoding="ascii") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] == "S"


def woken_by(wait: Callable[[], object], wake: Callable[[], object]) -> object:
    """Starts `wait` in a thread, lets `wake` happen once it sleeps, returns what `wait` returned."""
    result: list[object] = []
    thread = threading.Thread(target=lambda: result.append(wait()), daemon=True)
    thread.start()
    while not asleep(thread):
        os.sched_yield()
    wake()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive(), "not woken"
    return result[0]


def poll_of(*members: tuple[int, int]) -> Callable[[], object]:
    poll = select.poll()
    for fd, events in members:
        poll.register(fd, events)
    return lambda: poll.poll(TIMEOUT_S * 1000)


def data_wakes_everybody() -> None:
    read, write = os.pipe()
    for _ in range(200):
        with pair() as (a, b):
            fd = a.fileno()
            assert woken_by(poll_of((fd, select.POLLIN)), lambda: b.send(b"x")) == [(fd, select.POLLIN)]
            a.recv(1)
            assert woken_by(poll_of((fd, select.POLLIN), (read, select.POLLIN)), lambda: b.send(b"x")) == [
                (fd, 1)
            ]
            a.recv(1)
            got = woken_by(
                lambda: select.select([fd, read], [], [], TIMEOUT_S), lambda: os.write(write, b"x")
            )
            assert got == ([read], [], [])
            os.read(read, 1)
            for kernel in ((), (read,)):
                with select.epoll() as epoll:
                    for member in (fd, *kernel):
                        epoll.register(member, select.EPOLLIN)
                    assert woken_by(lambda: epoll.poll(TIMEOUT_S), lambda: b.send(b"x")) == [(fd, 1)]
                    a.recv(1)


def epoll_changes_while_waited_on() -> None:
    read, write = os.pipe()
    for _ in range(50):
        with pair() as (a, b), select.epoll() as epoll:
            epoll.register(read, select.EPOLLIN)  # at first the set is the kernel's alone
            fd = a.fileno()
            b.send(b"x")
            assert woken_by(lambda: epoll.poll(TIMEOUT_S), lambda: epoll.register(fd, select.EPOLLIN)) == [
                (fd, 1)
            ]
            epoll.modify(fd, 0)
            assert woken_by(lambda: epoll.poll(TIMEOUT_S), lambda: epoll.modify(fd, select.EPOLLIN)) == [
                (fd, 1)
            ]
            a.recv(1)
            got = woken_by(lambda: epoll.poll(TIMEOUT_S), lambda: a.shutdown(socket.SHUT_RD))
            assert got == [(fd, select.EPOLLIN)], got
    os.close(read)
    os.close(write)


def nested_sets_wake() -> None:
    with pair() as (a, b), select.epoll() as inner, select.epoll() as outer:
        inner.register(a, select.EPOLLIN)
        outer.register(inner.fileno(), select.EPOLLIN)
        ready = [(inner.fileno(), select.EPOLLIN)]
        assert woken_by(lambda: outer.poll(TIMEOUT_S), lambda: b.send(b"x")) == ready
        a.recv(1)
        assert woken_by(poll_of((inner.fileno(), select.POLLIN)), lambda: b.send(b"x")) == ready


def signals_interrupt() -> None:
    class Interrupted(Exception):
        pass

    def handler(number: int, frame: object) -> None:
        raise Interrupted

    signal.signal(signal.SIGUSR1, handler)
    main = threading.main_thread()

    def interrupt() -> None:
        while not asleep(main):
            os.sched_yield()
        assert main.ident is not None
        signal.pthread_kill(main.ident, signal.SIGUSR1)

    read, write = os.pipe()
    with pair() as (a, _), select.epoll() as epoll:
        epoll.register(a, select.EPOLLIN)
        calls: list[Callable[[], object]] = [
            lambda: a.recv(1),
            lambda: epoll.poll(TIMEOUT_S),
            poll_of((a.fileno(), select.POLLIN)),
            poll_of((a.fileno(), select.POLLIN), (read, select.POLLIN)),
            lambda: select.select([a], [], [], TIMEOUT_S),
        ]
        for call in calls:
            for _ in range(20):
                thread = threading.Thread(target=interrupt)
                thread.start()
                try:
                    call()
                except Interrupted:
                    thread.join()
                else:
                    raise AssertionError("not interrupted")
    os.close(read)
    os.close(write)


data_wakes_everybody()
epoll_changes_while_waited_on()
nested_sets_wake()
signals_interrupt()
