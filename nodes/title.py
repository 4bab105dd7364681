"""Process titles, so that `ps` tells a cluster's processes apart."""

from __future__ import annotations

import contextlib


def set_title(title: str, name: str) -> None:
    """Shows `title` as this process's command line and `name`, of 15 bytes at most, as its name.

    Writes over the command line in this process's own memory, where the kernel reads it from; a title
    that is longer than the command line that the process began with is cut.  Where the kernel forbids
    that, the short name alone changes.
    """
    text = title.encode()
    with contextlib.suppress(OSError):
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
        start, end = int(fields[45]), int(fields[46])  # fields 48 and 49: arg_start, arg_end
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(text[: end - start - 1].ljust(end - start, b"\0"))
    with contextlib.suppress(OSError), open("/proc/self/comm", "wb") as file:
        file.write(name.encode()[:15])
