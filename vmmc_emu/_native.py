"""libvmmc, called through cffi.

Nothing of its interface is written down here: the declarations are read from the C headers that are
installed beside the library, so Python cannot disagree with them.

    from vmmc_emu._native import ffi, lib
    lib.vmmc_layout_size(b"app")
"""

from __future__ import annotations

import re
from typing import Any

import cffi

from vmmc_emu.paths import native_file

HEADERS = ("vmmc_attach.h", "vmmc.h", "vmmc_inspect.h")

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_FOR_CPLUSPLUS = re.compile(r"^#ifdef __cplusplus$.*?^#endif$", re.DOTALL | re.MULTILINE)
_DIRECTIVE = re.compile(r"^#.*(?:\\\n.*)*$", re.MULTILINE)


def declarations(header: str) -> str:
    """The C declarations in a header's text, without what only a compiler needs."""
    text = _COMMENT.sub("", header)
    text = _FOR_CPLUSPLUS.sub("", text)
    text = _DIRECTIVE.sub("", text)
    return text.replace("VMMC_API ", "")


def _load() -> tuple[Any, Any]:
    declared = cffi.FFI()
    for name in HEADERS:
        declared.cdef(declarations(native_file(f"include/{name}").read_text(encoding="utf-8")))
    return declared, declared.dlopen(str(native_file("libvmmc.so")))


ffi, lib = _load()
