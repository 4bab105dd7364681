"""Nodes that lose their power, and get it back.

A node that is killed loses all at once, its programs, daemon and NIC and what they had in memory; started
again it is empty.  The supervisor does both, and records here, in one file a node that was ever off, whether
it is on and how often it was started.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from vmmc_emu import paths
from vmmc_emu.names import node_name
from vmmc_emu.paths import ClusterPaths


@dataclass(frozen=True)
class Power:
    """Of one node."""

    on: bool = True
    boot: int = 1  # how often it was started: what it said in an earlier life is not heard in this one
    last_serial: int = 0  # of an endpoint in earlier lives: none is used again
    restart: bool = False  # off for a moment: whoever supervises starts it anew


def _path(place: ClusterPaths, node: int) -> Path:
    return place.power / f"node{node}.json"


def read(place: ClusterPaths, node: int) -> Power:
    """A node's; one that was never off has no file."""
    try:
        return Power(**json.loads(_path(place, node).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Power()


def write(place: ClusterPaths, node: int, power: Power) -> None:
    """Records it; OSError: there is no room, in words for a person."""
    path = _path(place, node)
    draft = path.with_suffix(".draft")
    try:
        draft.write_text(json.dumps(asdict(power)), encoding="utf-8")
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise paths.not_recorded(place.power, error, f"{node_name(node)} is as it was") from error
    draft.rename(path)


def ever_off(place: ClusterPaths) -> dict[int, Power]:
    """Those that are off or were, by node."""
    found = {}
    for path in place.power.glob("node*.json"):
        node = int(path.stem.removeprefix("node"))
        found[node] = read(place, node)
    return found
