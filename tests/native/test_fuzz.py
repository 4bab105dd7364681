"""A program that writes anything into its segment, beside the firmware in one process: see fuzz.c.

Twice: under AddressSanitizer and UndefinedBehaviorSanitizer, and so compiled that the segment changes between
any two loads of the firmware's.  A third time libFuzzer chooses the steps, by what code they reach.  A few
seconds each with one seed, in CI a minute in all; for VMMC_FUZZ_MINUTES (`make fuzz`) with another.
"""

from __future__ import annotations

import os
import random
import secrets
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NIC = sorted((ROOT / "nodes/nic").glob("*.c"))
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-fno-strict-aliasing", "-O1", "-g", "-w", "-pthread"]
INCLUDES = [f"-I{ROOT / 'include'}", f"-I{ROOT / 'vmmc_emu/native'}"]
CHECKS = "-fsanitize=address,undefined"
MINUTES = float(os.environ.get("VMMC_FUZZ_MINUTES", "0"))
WAYS = 3
SECONDS = int(MINUTES * 60 / WAYS) if MINUTES else 60 // WAYS if os.environ.get("CI") else 8


def build(directory: Path, how: str) -> Path:
    """Compiles the firmware, whose main becomes nic_main, with the fuzzer."""
    compiler = "clang" if how == "libfuzzer" else os.environ.get("CC", "cc")
    firmware, own, more = {
        "sanitizers": ([CHECKS, "-fno-sanitize-recover=all"], [CHECKS], []),
        "fetches": (["-fsanitize=thread"], ["-DFETCHES"], ["fetches.c"]),
        "libfuzzer": ([f"{CHECKS},fuzzer-no-link"], [f"{CHECKS},fuzzer", "-DLIBFUZZER"], []),
    }[how]

    def compile_one(source: Path) -> str:
        made = directory / f"{source.stem}.o"
        flags = [*firmware, "-Dmain=nic_main"] if source in NIC else own
        subprocess.run([compiler, *FLAGS, *INCLUDES, *flags, "-c", str(source), "-o", str(made)], check=True)
        return str(made)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*NIC, HERE / "fuzz.c", *(HERE / name for name in more)]))
    binary = directory / "fuzz"
    link = [flag for flag in own if flag.startswith("-fsanitize")]
    wrapped = "-Wl,--wrap=mmap,--wrap=munmap"
    subprocess.run([compiler, "-pthread", *link, *objects, wrapped, "-o", str(binary)], check=True)
    return binary


@pytest.fixture(scope="module", params=["sanitizers", "fetches"])
def fuzz(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fuzzer."""
    return build(tmp_path_factory.mktemp("fuzz"), str(request.param))


def run(fuzz: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs it; what it says is in the report of a failing test."""
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=0:handle_sigbus=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [str(fuzz), *arguments]
    process = subprocess.Popen(
        command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=SECONDS + 100)
    finally:
        process.kill()
        process.wait()
        for segment in Path("/dev/shm").glob(f"vmmc.0.fuzz-{process.pid}.*"):
            segment.unlink()
    return subprocess.CompletedProcess(command, process.returncode, output)


def test_what_was_found(fuzz: Path) -> None:
    """Each thing that was found once: the NIC goes on, and the honest program notices nothing."""
    done = run(fuzz, "all")
    assert done.returncode == 0, done.stdout
    assert "accept-inside-an-entry" in done.stdout


@pytest.mark.timeout(0)
def test_anything(fuzz: Path) -> None:
    """Random steps: nothing is found."""
    seed = secrets.randbelow(1 << 30) if MINUTES else 1
    done = run(fuzz, str(seed), str(SECONDS))
    assert done.returncode == 0, done.stdout
    assert "nothing found" in done.stdout


def has_libfuzzer() -> bool:
    """Whether clang is there with libFuzzer, which Debian has in a package of its own."""
    target = "#include <stddef.h>\nint LLVMFuzzerTestOneInput(const char *d, size_t n) { return !d || n; }"
    command = ["clang", "-fsanitize=fuzzer", "-x", "c", "-", "-o", os.devnull]
    return subprocess.run(command, input=target, text=True, capture_output=True, check=False).returncode == 0


@pytest.mark.timeout(0)
@pytest.mark.programs("clang")
def test_libfuzzer(tmp_path: Path) -> None:
    """The same steps, chosen by coverage.  A failing input is in the report; fuzz.c says how to use it."""
    if not has_libfuzzer():
        problem = "clang has no libFuzzer: install libclang-rt-dev of its version"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(problem)
    binary = build(tmp_path, "libfuzzer")
    seed = secrets.randbelow(1 << 30) if MINUTES else 1
    # All lengths from the start; weighing how rare what they reach is takes a third of the time.
    flags = ["-max_len=1000", "-len_control=0", "-entropic=0"]
    flags += ["-rss_limit_mb=0", "-detect_leaks=0", "-close_fd_mask=2"]
    choose = random.Random(seed)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(400):
        (corpus / str(number)).write_bytes(choose.randbytes(choose.randrange(30, 1000)))
    done = run(binary, f"-max_total_time={SECONDS}", f"-seed={seed}", *flags, str(corpus), cwd=tmp_path)
    inputs = {path.name: path.read_bytes().hex() for path in tmp_path.glob("*-*") if path.is_file()}
    assert done.returncode == 0, f"{done.stdout}\n{inputs}"
    assert "Done" in done.stdout
