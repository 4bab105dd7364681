"""The messages of include/vmmc_attach.h, read from that very header: nothing is written down twice."""

from __future__ import annotations

import ctypes
import os
import re
import struct

from vmmc_emu.errors import ClusterError
from vmmc_emu.paths import native_directory, native_file

_CODES = {"uint32_t": "I", "int32_t": "i", "uint64_t": "Q", "int64_t": "q"}
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


class Message:
    """One structure of the header."""

    def __init__(self, fields: list[tuple[str, str]]) -> None:
        self.names = [name for _, name in fields]
        self._format = struct.Struct("=" + "".join(_CODES[kind] for kind, _ in fields))
        self.size = self._format.size

    def pack(self, **fields: int) -> bytes:
        """The structure's bytes; fields that are not named are 0."""
        unknown = fields.keys() - set(self.names)
        if unknown:
            raise KeyError(f"no such fields: {', '.join(sorted(unknown))}")
        return self._format.pack(*(fields.get(name, 0) for name in self.names))

    def unpack(self, data: bytes) -> dict[str, int] | None:
        """The fields by name; None: that is not such a structure."""
        if len(data) != self.size:
            return None
        return dict(zip(self.names, self._format.unpack(data), strict=True))


class Protocol:
    """Structures and constants of the control path, read from the headers of the native files."""

    def __init__(self) -> None:
        try:
            self._read()
        except KeyError as missing:
            raise ClusterError(
                f"the native files in {native_directory()} are of another version, which has no {missing}:"
                " build them anew, or unset VMMC_NATIVE_DIR"
            ) from None

    def _read(self) -> None:
        text = _COMMENT.sub("", native_file("include/vmmc_attach.h").read_text(encoding="utf-8"))
        structures = {
            name: Message(re.findall(r"(\w+)\s+(\w+)\s*;", body))
            for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL)
        }
        self.attach_request = structures["vmmc_attach_request"]
        self.attach_reply = structures["vmmc_attach_reply"]
        self.control = structures["vmmc_control"]
        self.control_wire = structures["vmmc_control_wire"]
        constants = {name: int(value) for name, value in re.findall(r"(VMMC_\w+) = (\d+)", text)}
        self.ATTACH = constants["VMMC_ATTACH"]
        self.VISIT = constants["VMMC_VISIT"]
        self.WAKER = constants["VMMC_WAKER"]
        self.CONTROL_ATTACH = constants["VMMC_CONTROL_ATTACH"]
        self.CONTROL_WAKER = constants["VMMC_CONTROL_WAKER"]
        self.CONTROL_DETACH = constants["VMMC_CONTROL_DETACH"]
        self.CONTROL_ATTACHED = constants["VMMC_CONTROL_ATTACHED"]
        self.CONTROL_GONE = constants["VMMC_CONTROL_GONE"]
        self.CONTROL_READY = constants["VMMC_CONTROL_READY"]
        self.CONTROL_EXPELLED = constants["VMMC_CONTROL_EXPELLED"]
        self.CONTROL_LOST = constants["VMMC_CONTROL_LOST"]
        self.CONTROL_DAMAGED = constants["VMMC_CONTROL_DAMAGED"]
        self.EXIT_DAMAGED = constants["VMMC_EXIT_DAMAGED"]
        self.CONTROL_WIRE = constants["VMMC_CONTROL_WIRE"]
        text = native_file("include/vmmc_layout.h").read_text(encoding="utf-8")
        defines = dict(re.findall(r"#define (VMMC_\w+) (0x[0-9a-fA-F]+|\d+)u?\b", text))
        self.MAGIC = int(defines["VMMC_MAGIC"], 0)
        self.VERSION = int(defines["VMMC_LAYOUT_VERSION"], 0)
        limits = dict(re.findall(r"\b(VMMC_(?:ENDPOINTS_MAX|MEMORY)) = (\d+)", text))
        self.ENDPOINTS_MAX = int(limits["VMMC_ENDPOINTS_MAX"])
        self.MEMORY = int(limits["VMMC_MEMORY"])


def segment_sizes() -> dict[str, int]:
    """Bytes of each kind of segment, from the library that was compiled with the layout.

    "served" is no segment: where in `pub` the serials of the endpoints that the NIC serves lie, by index.
    """
    library = ctypes.CDLL(str(native_file("libvmmc.so")))
    size = library.vmmc_layout_size
    size.restype = ctypes.c_uint64
    size.argtypes = [ctypes.c_char_p]
    sizes = {what: int(size(what.encode())) for what in ("app", "nic", "own", "pub", "door", "state")}
    page = 4096
    found = {what: -(-length // page) * page for what, length in sizes.items()}
    return {**found, "served": int(size(b"served"))}


_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Lets this process inherit, and so reap, its descendants whose parents die: NICs of killed daemons."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, f"prctl: {os.strerror(code)}")
