"""Where a cluster keeps its files, and where the native parts lie.

A cluster has a runtime directory (mode 0700: sockets, logs, who runs) and one file in /dev/shm beside
its segments, the lock: held by the cluster's supervisor and daemons as long as one of them lives, and
naming the runtime directory, so that a cluster is found from a shell with another XDG_RUNTIME_DIR.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from vmmc_emu.errors import ClusterError
from vmmc_emu.names import check_cluster_name, node_name, segment_prefix

SHM = Path("/dev/shm")
SOCKET_PATH_MAX = 107  # bytes of sun_path without its final NUL


@dataclass(frozen=True)
class ClusterPaths:
    """The files of one cluster."""

    cluster: str
    runtime: Path

    @property
    def description(self) -> Path:
        """cluster.json: how many nodes, who supervises, since when."""
        return self.runtime / "cluster.json"

    @property
    def control(self) -> Path:
        """The supervisor's socket: requests to start detached programs, and to change wires."""
        return self.runtime / "control.sock"

    @property
    def processes(self) -> Path:
        """One file a process of the cluster (see vmmc_emu.processes)."""
        return self.runtime / "processes"

    @property
    def logs(self) -> Path:
        """One file a daemon, NIC and detached program."""
        return self.runtime / "log"

    @property
    def wires(self) -> Path:
        """One file a node: the wires that lead to it and are not perfect (see vmmc_emu.wires)."""
        return self.runtime / "wires"

    def wires_of(self, node: int) -> Path:
        """That of one node."""
        return self.wires / f"{node_name(node)}.json"

    @property
    def supervision(self) -> Path:
        """Locked (flock) while a supervisor lives; a daemon that finds it free starts the next one."""
        return self.runtime / "supervisor.lock"

    @property
    def ending(self) -> Path:
        """There from when the cluster is being taken down: nobody is brought back any more."""
        return self.runtime / "ending"

    @property
    def power(self) -> Path:
        """One file a node that was ever off (see vmmc_emu.power)."""
        return self.runtime / "power"

    @property
    def restarts(self) -> Path:
        """One file for each process that ever had a successor (see vmmc_emu.processes)."""
        return self.runtime / "restarts"

    @property
    def hosts(self) -> Path:
        """What programs on the nodes find as /etc/hosts (preload/names.c)."""
        return self.runtime / "hosts"

    def interfaces(self, node: int) -> Path:
        """What programs on a node find as /proc/net/if_inet6."""
        return self.runtime / f"{node_name(node)}.if_inet6"

    def socket(self, node: int) -> Path:
        """The socket on which a node's daemon attaches programs."""
        return self.runtime / f"{node_name(node)}.sock"

    def segments(self) -> list[str]:
        """Names in /dev/shm of the cluster's segments; the lock is not one."""
        prefix = segment_prefix(self.cluster)
        return sorted(name for name in os.listdir(SHM) if name.startswith(prefix) and name != f"{prefix}lock")


def native_directory() -> Path:
    """Where libvmmc, the preload library, the NIC and the headers lie."""
    override = os.environ.get("VMMC_NATIVE_DIR")
    return Path(override).absolute() if override else Path(__file__).absolute().parent / "_native"


def native_file(name: str) -> Path:
    """The path of one native part; ClusterError when it is missing."""
    path = native_directory() / name
    if not path.exists():
        hint = (
            "VMMC_NATIVE_DIR names that directory"
            if "VMMC_NATIVE_DIR" in os.environ
            else "reinstall vmmc-emu"
        )
        raise ClusterError(f"{path} is missing: {hint}")
    return path


def runtime_root() -> Path:
    """The directory in which clusters get their runtime directories by default."""
    if root := os.environ.get("VMMC_RUNTIME_DIR"):
        return Path(root).absolute()
    if (root := os.environ.get("XDG_RUNTIME_DIR")) and os.access(root, os.W_OK):
        return Path(root).absolute() / "vmmc-emu"
    return Path(f"/tmp/vmmc-emu-{os.getuid()}")


def make_private_directory(path: Path) -> None:
    """Makes a directory of mode 0700, or makes sure that it is one, ours, and no link of somebody else's."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(path)
    except OSError as error:
        raise ClusterError(
            f"cannot make the directory {path}: {error.strerror}; VMMC_RUNTIME_DIR can name another place"
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ClusterError(
            f"{path} is not a directory of yours: remove it, or let VMMC_RUNTIME_DIR name another place"
        )
    if status.st_mode & 0o077:
        os.chmod(path, 0o700)


def not_recorded(directory: Path, error: OSError, unchanged: str) -> OSError:
    """The error for a person when a record could not be written: where, what is as it was, what to do."""
    advice = {
        errno.ENOSPC: "; free some space there and try again",
        errno.EDQUOT: "; free some of your space there and try again",
    }.get(error.errno or 0, "")
    return OSError(error.errno, f"{directory}: {error.strerror}: {unchanged}{advice}")


def cluster_paths(cluster: str) -> ClusterPaths:
    """The files of the cluster of that name, whether it is up or not."""
    check_cluster_name(cluster)
    if not os.environ.get("VMMC_RUNTIME_DIR") and (recorded := recorded_runtime(cluster)):
        return ClusterPaths(cluster, recorded)
    return ClusterPaths(cluster, runtime_root() / cluster)


def check_socket_paths(paths: ClusterPaths, nodes: int) -> None:
    """Raises ClusterError when the runtime directory's path is too long for Unix sockets."""
    longest = max(os.fsencode(paths.socket(nodes - 1)), os.fsencode(paths.control), key=len)
    if len(longest) > SOCKET_PATH_MAX:
        raise ClusterError(
            f"the runtime directory {paths.runtime} has too long a path: a Unix socket's path has at most"
            f" {SOCKET_PATH_MAX} bytes and {os.fsdecode(longest)} has {len(longest)};"
            " let VMMC_RUNTIME_DIR name a shorter one"
        )


# ---- the lock ----

# struct flock.  A lock of an open file description: daemons share the supervisor's through fork, and one
# can ask whether it is held without taking it (a flock cannot be asked).
_FLOCK = "hhqqi4x"
_WHOLE_FILE = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def lock_path(cluster: str) -> Path:
    """The file in /dev/shm that a cluster's supervisor and daemons hold."""
    return SHM / f"{segment_prefix(cluster)}lock"


def recorded_runtime(cluster: str) -> Path | None:
    """The runtime directory that the cluster's lock names, or None."""
    try:
        descriptor = os.open(lock_path(cluster), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        if os.fstat(descriptor).st_uid != os.getuid():
            return None  # somebody else's file under our name says nothing
        try:
            return Path(json.loads(file.read())["runtime"])
        except (ValueError, KeyError, TypeError):
            return None  # killed before it was written


def take_lock(paths: ClusterPaths) -> int | None:
    """Locks the cluster's name and records where its files are; the descriptor, or None: it is taken."""
    path = lock_path(paths.cluster)
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except PermissionError:
            raise ClusterError(f"{path} belongs to another user: choose another cluster name") from None
        if os.fstat(descriptor).st_uid != os.getuid():
            os.close(descriptor)
            raise ClusterError(f"{path} belongs to another user: choose another cluster name")
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        except BlockingIOError:
            os.close(descriptor)
            return None
        try:
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its holder removed it between our open and our lock: begin again
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"runtime": str(paths.runtime)}).encode(), 0)
    return descriptor


def release_lock(paths: ClusterPaths, descriptor: int) -> None:
    """Removes the lock, which the caller holds, and lets go of it."""
    lock_path(paths.cluster).unlink(missing_ok=True)
    os.close(descriptor)


def lock_is_held(paths: ClusterPaths) -> bool:
    """True while a supervisor or daemon of that cluster lives, wherever its files are."""
    try:
        descriptor = os.open(lock_path(paths.cluster), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            return False
        return lock_in_the_way(descriptor, fcntl.F_OFD_GETLK)[0]
    finally:
        os.close(descriptor)


def lock_in_the_way(descriptor: int, command: int) -> tuple[bool, int]:
    """Whether somebody has the file locked, asked by F_GETLK or F_OFD_GETLK, and by whom.

    The second is a process id, or -1 where the lock is an open file description's.
    """
    kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, command, _WHOLE_FILE))
    return kind != fcntl.F_UNLCK, pid


def known_clusters() -> list[ClusterPaths]:
    """Every cluster of this user that has left a trace: runtime directories, locks and segments.

    When VMMC_RUNTIME_DIR is set, only what has its files there.
    """
    confined = bool(os.environ.get("VMMC_RUNTIME_DIR"))
    root = runtime_root()
    names = {entry.name for entry in root.iterdir() if entry.is_dir()} if root.is_dir() else set()
    prefix = f"vmmc.{os.getuid()}."
    for name in os.listdir(SHM):
        if name.startswith(prefix):
            cluster = name.removeprefix(prefix).partition(".")[0]
            if not confined or recorded_runtime(cluster) == root / cluster:
                names.add(cluster)
    found = []
    for name in sorted(names):
        try:
            found.append(cluster_paths(name))
        except ClusterError:
            continue  # a directory that no cluster of ours can have made
    return found
