"""Looks at a program before it starts: would it silently go around VMMC?

The preload library is put in front of libc by the dynamic linker.  A program that has none, makes
system calls itself, or is given privileges by the kernel (then the linker ignores LD_PRELOAD) talks to
the kernel's network as if there were no cluster.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import struct
import sys
from pathlib import Path
from typing import BinaryIO

_SCRIPT_DEPTH = 5  # interpreters of interpreters that the kernel follows
_PT_INTERP = 3
_MUSL = b"ld-musl"


def find_program(name: str, path: str | None = None) -> Path | None:
    """The file that execvp would run for `name`."""
    found = shutil.which(name, path=path)
    return Path(found) if found else None


def bypasses(program: Path, path: str | None = None) -> list[str]:
    """Why programs started from this file would go around VMMC: phrases that complete "it …"."""
    for _ in range(_SCRIPT_DEPTH):
        found = _privileges(program)
        try:
            with open(program, "rb") as file:
                start = file.read(64)
                if not start.startswith(b"#!"):
                    return found + _elf(file, start)
                file.seek(0)
                line = file.readline(4096)
        except OSError:
            return found  # starting it will say what is wrong
        interpreter = _interpreter(line, path)
        if interpreter is None:
            return found
        program = interpreter
    return []


def _interpreter(line: bytes, path: str | None) -> Path | None:
    """The program that runs a script with this first line."""
    words = os.fsdecode(line[2:]).split()
    if not words:
        return None
    if os.path.basename(words[0]) == "env":
        names = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
        return find_program(names[0], path) if names else None
    return Path(words[0])


def _privileges(program: Path) -> list[str]:
    """Set-user-id and its like: of no effect on who has that identity already."""
    try:
        status = os.stat(program)
    except OSError:
        return []
    found = []
    if status.st_mode & stat.S_ISUID and status.st_uid != os.geteuid():
        found.append("is set-user-id, so that the system does not let it load the VMMC library")
    elif status.st_mode & stat.S_ISGID and status.st_mode & stat.S_IXGRP and status.st_gid != os.getegid():
        found.append("is set-group-id, so that the system does not let it load the VMMC library")
    elif os.geteuid():
        with contextlib.suppress(OSError):
            os.getxattr(program, "security.capability")
            found.append("has file capabilities, so that the system does not let it load the VMMC library")
    return found


def _elf(file: BinaryIO, start: bytes) -> list[str]:
    """What an ELF file's headers tell; its first 64 bytes are in `start`."""
    if not start.startswith(b"\x7fELF") or len(start) < 52:
        return []  # not for us to say
    with open(sys.executable, "rb") as ours:
        native = ours.read(20)
    if start[4:6] != native[4:6] or start[18:20] != native[18:20]:
        return ["is built for another ABI than the VMMC library"]
    wide = start[4] == 2
    order = "<" if start[5] == 1 else ">"
    if wide:
        (headers,) = struct.unpack_from(order + "Q", start, 32)
        (sections,) = struct.unpack_from(order + "Q", start, 40)
        header_size, header_count, section_size, section_count, names = struct.unpack_from(
            order + "5H", start, 54
        )
    else:
        (headers,) = struct.unpack_from(order + "I", start, 28)
        (sections,) = struct.unpack_from(order + "I", start, 32)
        header_size, header_count, section_size, section_count, names = struct.unpack_from(
            order + "5H", start, 42
        )
    file.seek(headers)
    table = file.read(header_size * header_count)
    interpreter = None
    for i in range(header_count):
        entry = table[i * header_size : (i + 1) * header_size]
        if len(entry) == header_size and struct.unpack_from(order + "I", entry)[0] == _PT_INTERP:
            offset, size = (
                (struct.unpack_from(order + "Q", entry, 8)[0], struct.unpack_from(order + "Q", entry, 32)[0])
                if wide
                else struct.unpack_from(order + "I8xI", entry, 4)
            )
            file.seek(offset)
            interpreter = file.read(min(size, 4096))
    if _is_go(file, order, wide, sections, section_size, section_count, names):
        return ["is a Go program, which calls the kernel without the C library"]
    if interpreter is None:
        return ["is statically linked, so that no library can be put in front of it"]
    if _MUSL in interpreter:
        return ["is built for another C library (musl) than the VMMC library"]
    return []


def _is_go(file: BinaryIO, order: str, wide: bool, sections: int, size: int, count: int, names: int) -> bool:
    """Whether the sections are those that Go's linker makes."""
    if not sections or names >= count:
        return False
    file.seek(sections)
    table = file.read(size * count)
    if len(table) < size * count:
        return False
    where, length = (24, "QQ") if wide else (16, "II")
    offset, extent = struct.unpack_from(order + length, table, names * size + where)
    file.seek(offset)
    strings = b"\0" + file.read(min(extent, 1 << 20))
    return b"\0.go.buildinfo\0" in strings or b"\0.note.go.buildid\0" in strings
