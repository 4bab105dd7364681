"""How wires are set, checked, kept and told: what a wire then does stands in the other files here."""

from __future__ import annotations

from typing import Any

import pytest

from vmmc_emu import Cluster, observe, wires
from vmmc_emu.errors import ClusterError
from vmmc_emu.wires import Change, Wire


def test_a_change_concerns_the_named_pairs_and_settings_alone(eight_nodes: Cluster) -> None:
    """Each direction by itself; what is not named stays; a reset begins with a perfect wire."""
    place = eight_nodes.place
    wires.change(place, [Change([0, 1], [1, 2], {"delay_ns": 1000})])
    wires.change(place, [Change([0], [1], {"jitter_ns": 10}), Change([1], [2], {"up": False}, reset=True)])
    assert wires.present(place) == {
        (0, 1): Wire(delay_ns=1000, jitter_ns=10),
        (0, 2): Wire(delay_ns=1000),
        (1, 2): Wire(up=False),
    }
    wires.change(place, [Change(range(8), range(8), {}, reset=True)])
    assert wires.present(place) == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": 1.5}, ("loss", "0 to 1", "1.5")),
        ({"corrupt": -0.1}, ("corrupt", "-0.1")),
        ({"duplicate": "1%"}, ("duplicate", "'1%'")),
        ({"delay_ns": 0.5}, ("delay_ns", "0.5")),
        ({"jitter_ns": 5_000_000}, ("jitter", "here 5ms", "delay", "here 0")),
        ({"jitter_ns": 2_000_001, "delay_ns": 2_000_000}, ("jitter", "2.000001ms", "delay", "2ms")),
        ({"loss": 1e-12}, ("loss", "0 or", "1e-09 to 1", "1e-12")),
        ({"unreachable_ns": 1}, ("unreachable_ns", "0 or", "from 20000000 to")),
        ({"up": 3}, ("up", "True or False", "3")),
        ({"losses": 0.1}, ("losses", "loss")),
    ],
)
def test_a_bad_value_is_named_and_changes_nothing(
    two_nodes: Cluster, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    """Not even the changes before it in the same request."""
    with pytest.raises(ClusterError) as failed:
        wires.change(two_nodes.place, [Change([1], [0], {"loss": 0.5}), Change([0], [1], settings)])
    assert all(word in str(failed.value) for word in words)
    assert wires.present(two_nodes.place) == {}


def test_wires_are_between_nodes_that_are_there(two_nodes: Cluster) -> None:
    """A node has none to itself."""
    for pair, words in (((0, 2), "no node 2"), ((1, 1), "itself")):
        with pytest.raises(ClusterError, match=words):
            wires.change(two_nodes.place, [Change([pair[0]], [pair[1]], {"loss": 0.5})])


def test_counters_of_nodes_that_have_not_talked_are_nought(two_nodes: Cluster) -> None:
    """All of them are there."""
    found = observe.link_counters(two_nodes.name, 0, 1)
    assert {"wire_dropped", "packets_resent", "timeouts", "round_trip_ns"} <= found.keys()
    assert set(found.values()) == {0}
    with pytest.raises(OSError, match="node2"):
        observe.link_counters(two_nodes.name, 2, 0)
