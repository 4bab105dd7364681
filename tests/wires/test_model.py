"""The model of the link's protocol, docs/link.pml: nothing lost, doubled or stuck."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).resolve().parents[2] / "docs" / "link.pml"
CC = os.environ.get("CC", "cc")

pytestmark = pytest.mark.programs("spin")


def search(directory: Path, source: str, flags: tuple[str, ...], options: tuple[str, ...]) -> str:
    """What an exhaustive search of a model says."""
    (directory / "model.pml").write_text(source, encoding="utf-8")
    done = subprocess.run(
        ["spin", "-a", "model.pml"], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "Error" not in done.stdout
    subprocess.run([CC, "-O1", "-w", *flags, "-o", "pan", "pan.c"], cwd=directory, check=True)
    done = subprocess.run(
        ["./pan", "-m1000000", *options], cwd=directory, capture_output=True, text=True, check=False
    )
    assert "Search not completed" not in done.stdout or "errors: 0" not in done.stdout
    return done.stdout


SAFETY = (("-DSAFETY", "-DNOCLAIM"), ())
LIVENESS = ((), ("-a", "-f"))


@pytest.mark.parametrize(("flags", "options"), [SAFETY, LIVENESS], ids=["safety", "liveness"])
def test_the_protocol_keeps_its_promises(
    tmp_path: Path, flags: tuple[str, ...], options: tuple[str, ...]
) -> None:
    """In every state that loss, duplication, reordering and killed NICs lead to."""
    assert "errors: 0" in search(tmp_path, MODEL.read_text(encoding="utf-8"), flags, options)


@pytest.mark.parametrize(
    ("right", "wrong", "flags", "options"),
    [
        (
            ":: n < taken || early[n % WINDOW]",
            ":: early[n % WINDOW]",
            *SAFETY,
        ),  # duplicates are not recognised
        ("tail - acknowledged < WINDOW", "tail - acknowledged <= WINDOW", *SAFETY),  # places used too early
        ("owes = true;\n       if", "if", *LIVENESS),  # what was there already is not acknowledged again
        (
            "n = acknowledged;\n       transmit(n)",
            "n = tail - 1;\n       transmit(n)",
            *LIVENESS,
        ),  # not the oldest
    ],
)
def test_the_model_finds_what_is_wrong(
    tmp_path: Path, right: str, wrong: str, flags: tuple[str, ...], options: tuple[str, ...]
) -> None:
    """A protocol with one mistake in it breaks a promise."""
    source = MODEL.read_text(encoding="utf-8")
    assert right in source
    found = search(tmp_path, source.replace(right, wrong), flags, options)
    assert "errors: 1" in found, found
