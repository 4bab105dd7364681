"""The NIC, the library and a program as threads of one process, under sanitizers.

ThreadSanitizer sees no races between processes, so the three are linked into one binary that shares its
mappings; see one_process.c for what it does.
"""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NIC = sorted((ROOT / "nodes/nic").glob("*.c"))
LIBRARY = sorted(p for p in (ROOT / "vmmc_emu/native").glob("*.c") if not p.name.startswith("bench_"))
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-fno-strict-aliasing", "-O1", "-g", "-w", "-pthread"]
INCLUDES = [f"-I{ROOT / 'include'}", f"-I{ROOT / 'vmmc_emu/native'}"]
SEEDS = (1, 2, 3, 4)


def build(directory: Path, sanitizer: str) -> Path:
    """Compile everything with `sanitizer`; the NIC's main becomes nic_main."""
    compiler = [os.environ.get("CC", "cc"), *FLAGS, *INCLUDES, f"-fsanitize={sanitizer}"]

    def compile_one(source: Path) -> str:
        made = directory / f"{source.parent.name}-{source.stem}.o"
        rename = ["-Dmain=nic_main"] if source in NIC else []
        subprocess.run([*compiler, *rename, "-c", str(source), "-o", str(made)], check=True)
        return str(made)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*NIC, *LIBRARY, Path(__file__).with_name("one_process.c")]))
    binary = directory / "one_process"
    wrapped = ["-Wl,--wrap=mmap,--wrap=munmap"]
    subprocess.run([*compiler, *objects, *wrapped, "-o", str(binary)], check=True)
    return binary


@pytest.fixture(scope="module", params=["thread", "address,undefined"])
def binary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sanitized binary."""
    return build(tmp_path_factory.mktemp("one-process"), str(request.param))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_race_and_every_byte_in_place(binary: Path, tmp_path: Path, seed: int) -> None:
    """Streams and redirected sends arrive whole, and the sanitizer has nothing to say."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VMMC_", "LD_PRELOAD"))}
    environment |= {
        "TSAN_OPTIONS": "exitcode=66",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    process = subprocess.Popen(
        [str(binary), str(tmp_path), str(seed)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
        for segment in Path("/dev/shm").glob(f"vmmc.0.one-process-{process.pid}.*"):
            segment.unlink()
    assert process.returncode == 0, output
    assert "every byte" in output
