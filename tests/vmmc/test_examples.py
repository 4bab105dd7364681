"""The VMMC examples, run as a reader would."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from vmmc_emu import Cluster
from vmmc_emu.paths import native_directory

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def compile_with_vmmc(source: Path, program: Path) -> None:
    """As vmmc_ping_pong.c says; by hand where there is no pkg-config."""
    native = native_directory()
    flags = f"-I{native}/include -L{native} -lvmmc -Wl,-rpath,{native}"
    if tool := shutil.which("pkg-config"):
        environment = {**os.environ, "PKG_CONFIG_PATH": str(native / "pkgconfig")}
        command = [tool, "--cflags", "--libs", "vmmc"]
        flags = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    sanitizer = [f"-fsanitize={os.environ['SANITIZE']}"] if "SANITIZE" in os.environ else []
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [compiler, "-Wall", "-Wextra", "-Werror", *sanitizer, "-o", program, source, *shlex.split(flags)],
        check=True,
    )


def test_ping_pong(vmmc_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    program = tmp_path / "ping_pong"
    compile_with_vmmc(EXAMPLES / "vmmc_ping_pong.c", program)
    cluster = vmmc_cluster(nodes=2)
    pong = cluster.node(1).popen([program])
    ping = cluster.node(0).run([program], timeout=60)
    assert ping.returncode == 0, ping.stderr
    assert ping.stdout.startswith("10000 rounds, ")
    assert pong.wait(timeout=10) == 0


def test_put() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "vmmc_put.py"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "node1 put b'hello!' at offset 100, with tag 7",
        "fetched back: b'hello!'",
        "redirected: [200, 206) elsewhere: b'hello!'",
        "{'bytes_received': 12, 'bytes_redirected': 6, 'bytes_default': 6, 'notifications': 1}",
    ]
