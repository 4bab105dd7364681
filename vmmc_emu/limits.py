"""What the machine must offer: checked before a cluster starts, and explained by `vmmc-emu doctor`."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmmc_emu.errors import ClusterError
from vmmc_emu.paths import SHM, native_directory, native_file, runtime_root

# What one node commits in /dev/shm when it starts (measured: see docs/architecture.md), with a margin,
# and what one attached program commits before it opens many connections.
NODE_SHM_BYTES = 192 * 1024
PROGRAM_SHM_BYTES = 512 * 1024

NODE_DESCRIPTORS = 6  # that the supervisor holds for one node
SPARE_DESCRIPTORS = 64
LARGEST_SEGMENT_BYTES = 34 << 30  # VMMC_APP_BYTES: sparse, but limits on file and address-space size apply


def mebibytes(count: float) -> str:
    """A number of bytes for people: "12.5 MiB", "0.04 MiB", "24100 MiB"."""
    number = count / (1 << 20)
    return f"{number:.0f} MiB" if number >= 1000 else f"{number:.3g} MiB"


def shm_free_bytes() -> int:
    """Bytes that can still be committed in /dev/shm."""
    try:
        status = os.statvfs(SHM)
    except OSError as error:
        raise ClusterError(
            f"{SHM} is needed for shared memory and cannot be used: {error.strerror}; mount a tmpfs there"
        ) from None
    # A tmpfs without a limit reports no blocks at all; then memory itself is the limit.
    return status.f_bavail * status.f_frsize if status.f_blocks else 1 << 62


def _finite(limit: int) -> int | None:
    value = resource.getrlimit(limit)[1]
    return None if value == resource.RLIM_INFINITY else value


def check_room(nodes: int) -> None:
    """Raises ClusterError, with what is needed and what there is, when such a cluster cannot start."""
    native_file("vmmc-nic")
    native_file("libvmmc.so")
    native_file("libvmmc-preload.so")
    needed, free = nodes * NODE_SHM_BYTES, shm_free_bytes()
    if free < needed:
        raise ClusterError(
            f"not enough room in {SHM}: {nodes} nodes need {mebibytes(needed)} there"
            f" and {mebibytes(free)} is free; free some, start fewer nodes, or make it larger"
            " (mount -o remount,size=1G /dev/shm; docker run --shm-size=1g)"
        )
    needed = nodes * NODE_DESCRIPTORS + SPARE_DESCRIPTORS
    if (limit := _finite(resource.RLIMIT_NOFILE)) is not None and limit < needed:
        raise ClusterError(
            f"{nodes} nodes need {needed} open files in one process and the hard limit is {limit}:"
            " raise it (ulimit -Hn, LimitNOFILE=) or start fewer nodes"
        )
    needed = 2 * nodes + 1
    if os.getuid() and (limit := _finite(resource.RLIMIT_NPROC)) is not None:  # root is not held to it
        running = _own_threads()
        if limit - running < needed:
            raise ClusterError(
                f"{nodes} nodes need {needed} processes; the limit is {limit} and {running} run already:"
                " raise it (ulimit -u) or start fewer nodes"
            )
    for number, what, option in (
        (resource.RLIMIT_FSIZE, "the largest file", "ulimit -f unlimited"),
        (resource.RLIMIT_AS, "a process's address space", "ulimit -v unlimited"),
    ):
        soft = resource.getrlimit(number)[0]
        if soft != resource.RLIM_INFINITY and soft < 4 * LARGEST_SEGMENT_BYTES:
            raise ClusterError(
                f"the limit on {what} is {mebibytes(soft)}; segments are sparse, but need a limit of"
                f" {mebibytes(4 * LARGEST_SEGMENT_BYTES)} or more: {option}"
            )


def _own_threads() -> int:
    """How many threads this user runs: what RLIMIT_NPROC counts."""
    total = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == os.getuid():
                    total += len(os.listdir(f"/proc/{entry.name}/task"))
            except OSError:
                continue  # ended meanwhile
    return total


# ---- doctor ----


@dataclass(frozen=True)
class Finding:
    """One thing that doctor looked at."""

    what: str
    ok: bool
    found: str
    advice: str = ""  # how to mend it; with ok: worth knowing


def doctor() -> Iterator[Finding]:
    """Looks at everything that a cluster needs from the machine."""
    checks: tuple[Callable[[], Finding], ...] = (
        _check_kernel,
        _check_python,
        _check_shm,
        _check_descriptors,
        _check_processes,
        _check_sizes,
        _check_pinning,
        _check_ptrace,
        _check_runtime,
        _check_nic,
        _check_preload,
        _check_cores,
    )
    for check in checks:
        yield check()


def _check_kernel() -> Finding:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    ok = platform.system() == "Linux" and numbers >= (5, 9)
    return Finding(
        "kernel", ok, f"{platform.system()} {release}", "" if ok else "Linux 5.9 or newer is needed (pidfd)"
    )


def _check_python() -> Finding:
    missing = []
    for module in ("posix_ipc", "psutil", "click", "cffi"):
        try:
            __import__(module)
        except ImportError:
            missing.append(module)
    found = f"{platform.python_version()}, " + (
        f"missing: {', '.join(missing)}" if missing else "all packages there"
    )
    return Finding("Python", not missing, found, "pip install vmmc-emu brings them" if missing else "")


def _check_shm() -> Finding:
    try:
        free = shm_free_bytes()
    except ClusterError as error:
        return Finding("shared memory", False, "unusable", str(error))
    needed = 8 * (NODE_SHM_BYTES + PROGRAM_SHM_BYTES)
    if free < needed:
        advice = (
            f"8 nodes with a program each need {mebibytes(needed)}:"
            " mount -o remount,size=1G /dev/shm, or docker run --shm-size=1g"
        )
        return Finding("shared memory", False, f"{mebibytes(free)} free in {SHM}", advice)
    found = "no limit" if free == 1 << 62 else f"{mebibytes(free)} free"
    return Finding("shared memory", True, f"{found} in {SHM}")


def _check_descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ok = hard == resource.RLIM_INFINITY or hard >= 8 * NODE_DESCRIPTORS + SPARE_DESCRIPTORS
    advice = "" if ok else "raise it: ulimit -Hn, LimitNOFILE= or nofile in /etc/security/limits.conf"
    return Finding("open files", ok, f"{soft} (at most {hard})", advice)


def _check_processes() -> Finding:
    limit = _finite(resource.RLIMIT_NPROC)
    if limit is None or os.getuid() == 0:
        return Finding("processes", True, "no limit")
    left = limit - _own_threads()
    ok = left >= 32
    advice = "" if ok else "8 nodes and their programs need 32 or more: ulimit -u"
    return Finding("processes", ok, f"{left} left of {limit}", advice)


def _check_sizes() -> Finding:
    for number, option in ((resource.RLIMIT_FSIZE, "ulimit -f"), (resource.RLIMIT_AS, "ulimit -v")):
        soft = resource.getrlimit(number)[0]
        if soft != resource.RLIM_INFINITY and soft < 4 * LARGEST_SEGMENT_BYTES:
            return Finding(
                "file and memory size", False, f"{option} is {mebibytes(soft)}", f"{option} unlimited"
            )
    return Finding("file and memory size", True, "no limit in the way")


def _check_pinning() -> Finding:
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found = "no limit" if soft == resource.RLIM_INFINITY else mebibytes(soft)
    return Finding(
        "locked memory", True, found, "pinning commits memory and does not lock it: any limit will do"
    )


def _check_ptrace() -> Finding:
    try:
        scope = Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii").strip()
    except OSError:
        return Finding("ptrace scope", True, "not restricted (no Yama)")
    advice = (
        ""
        if scope == "0"
        else "nothing needs it to be 0; debuggers attach only with sysctl kernel.yama.ptrace_scope=0"
    )
    return Finding("ptrace scope", True, scope, advice)


def _check_runtime() -> Finding:
    root = runtime_root()
    place = root
    while not os.path.exists(place):  # Path.exists raises where a directory above may not be looked into
        place = place.parent
    ok = os.access(place, os.W_OK | os.X_OK)
    return Finding(
        "runtime directory", ok, str(root), "" if ok else "let VMMC_RUNTIME_DIR name a directory of yours"
    )


def _check_nic() -> Finding:
    path = native_directory() / "vmmc-nic"
    if os.access(path, os.X_OK):
        return Finding("NIC program", True, f"{path} (no compiler is needed to run)")
    return Finding("NIC program", False, f"{path} is missing or not executable", "reinstall vmmc-emu")


def _check_preload() -> Finding:
    path = native_directory() / "libvmmc-preload.so"
    program = shutil.which("true") or "/bin/true"
    if not path.exists():
        return Finding("preload library", False, f"{path} is missing", "reinstall vmmc-emu")
    done = subprocess.run(
        [program],
        env={"LD_PRELOAD": str(path), "PATH": os.defpath},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or done.stderr:
        advice = "it was built for another C library or machine: reinstall vmmc-emu here"
        return Finding("preload library", False, done.stderr.strip() or f"{program} fails under it", advice)
    return Finding("preload library", True, f"{path} loads")


def _check_cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    advice = "" if cores > 1 else "it works, but every message then waits for a switch between processes"
    return Finding("processor cores", True, str(cores), advice)
