"""What happens to a packet on a wire: a function of seed, direction, number and attempt, and nothing else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-fno-strict-aliasing", "-O1", "-w", "-pthread"]


@pytest.fixture(scope="module")
def chance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The firmware, whose main is another one's."""
    binary = tmp_path_factory.mktemp("chance") / "chance"
    firmware = [str(path) for path in sorted((ROOT / "nodes/nic").glob("*.c")) if path.name != "main.c"]
    main = binary.with_name("main.c")  # what it has besides its main
    main.write_text(f'#define main nic_main\n#include "{ROOT / "nodes/nic/main.c"}"\n')
    command = [
        os.environ.get("CC", "cc"), *FLAGS, f"-I{ROOT / 'include'}", f"-I{ROOT / 'nodes/nic'}",
        str(HERE / "chance.c"), str(main), *firmware, "-o", str(binary),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return binary


def asked(chance: Path, seed: int, sender: int, receiver: int, order: str = "forwards") -> list[str]:
    """A line for each transmission."""
    command = [str(chance), str(seed), str(sender), str(receiver), order]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_run_can_be_repeated(chance: Path) -> None:
    """In whatever order and at whatever time packets are sent, each meets what it met before."""
    first = asked(chance, 7, 0, 1)
    assert len(first) == 1500
    assert asked(chance, 7, 0, 1, "backwards") == first
    fates = {line.partition(": ")[2].split(" ")[0] for line in first}
    assert fates == {"lost", "1", "2"}  # whole or damaged, once or twice
    assert 200 < sum(line.endswith("lost") for line in first) < 400  # of 1500, 20 %


@pytest.mark.parametrize("other", [(8, 0, 1), (7, 1, 0), (7, 0, 2)], ids=["seed", "way back", "link"])
def test_another_run_is_another(chance: Path, other: tuple[int, int, int]) -> None:
    first, second = asked(chance, 7, 0, 1), asked(chance, *other)
    same = sum(a == b for a, b in zip(first, second, strict=True))
    assert same < 200  # both lost: 4 %
    attempts = [line.partition(": ")[2] for line in first]
    assert any(attempts[i] != attempts[i + 1] for i in range(0, 1500, 3))
