"""The wires between nodes: one each way for each pair, perfect unless somebody says otherwise.

    from vmmc_emu import wires
    wires.change(cluster.place, [wires.Change([0], [1], {"loss": 0.01, "delay_ns": 2_000_000})])
    wires.change(cluster.place, [wires.Change([0], [1], {}, reset=True)])
    wires.present(cluster.place)[0, 1].loss
    observe.link_counters(cluster.name, 0, 1)["packets_resent"]

A change goes to the supervisor, which checks all of it before it does any of it, records it in the runtime
directory (one file a node, of the wires that lead there), and pokes the daemons concerned; these tell their
NICs, and tell each successor again.  It takes effect on live traffic within milliseconds, and whoever asked
for it is answered when the NICs have been told.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmmc_emu import lifecycle, paths
from vmmc_emu.errors import ClusterError
from vmmc_emu.names import node_name
from vmmc_emu.paths import ClusterPaths

_SECOND_NS = 10**9

UNREACHABLE_NS = 10 * _SECOND_NS  # of silence, when nothing else is set

TIMES = {"ns": 1.0, "us": 1e3, "ms": 1e6, "s": 1e9}


def in_units(value: float, units: Mapping[str, float]) -> str:
    """A number in the largest unit of which it has one, as in 2ms; all its digits, as it may be set again."""
    for unit, scale in sorted(units.items(), key=lambda each: -each[1]):
        if value >= scale:
            return f"{value / scale:.15g}{unit}"
    return "0"


@dataclass(frozen=True)
class Wire:
    """One direction between two nodes.  As made without arguments it is perfect."""

    up: bool = True  # False: nothing gets through
    loss: float = 0.0  # probabilities, 0 to 1: a packet is lost,
    corrupt: float = 0.0  # has bits flipped,
    duplicate: float = 0.0  # comes twice,
    reorder: float = 0.0  # is held back so that later ones overtake it
    delay_ns: int = 0  # from end to end,
    jitter_ns: int = 0  # more or less by up to so much; not more than the delay
    rate_bits_per_s: int = 0  # 0: no limit
    limit_packets: int = 0  # that may be under way, the next is dropped; 0: no limit
    seed: int = 0  # of every random decision
    unreachable_ns: int = 0  # silence after which a sender gives its peer up; 0: UNREACHABLE_NS
    # What the receiver's work costs on the machine that is emulated: for each packet of a stream, and for
    # each of its bytes, in picoseconds, that goes to a posted address or to the default buffer.
    stream_packet_ns: int = 0
    stream_redirected_ps_per_byte: int = 0
    stream_default_ps_per_byte: int = 0

    @classmethod
    def checked(cls, before: Wire, settings: Mapping[str, Any]) -> Wire:
        """`before` with these settings; ClusterError names the one that cannot be, and its range."""
        for name, value in settings.items():
            if name not in RANGES:
                raise ClusterError(f"a wire has no {name!r}: it has {', '.join(RANGES)}")
            low, high = RANGES[name]
            whole = name not in PROBABILITIES
            kinds = (bool,) if name == "up" else (int,) if whole else (int, float)
            if not isinstance(value, kinds) or (name != "up" and isinstance(value, bool)):
                raise ClusterError(f"{name} of a wire is {_range(low, high)}, not {value!r}")
            if not low <= value <= high:
                raise ClusterError(f"{name} of a wire is {_range(low, high)}: {value!r} is out of range")
            if name in LEAST and too_small(value, LEAST[name]):
                raise ClusterError(f"{name} of a wire is 0 or {_range(LEAST[name], high)}: {value!r} is less")
        wire = dataclasses.replace(before, **settings)
        if wire.jitter_ns > wire.delay_ns:
            raise ClusterError(
                f"jitter (here {in_units(wire.jitter_ns, TIMES)}) cannot be more than the delay"
                f" (here {in_units(wire.delay_ns, TIMES)}): no packet arrives before it is sent"
            )
        return wire

    @property
    def is_perfect(self) -> bool:
        """True when it is as good as made without arguments: a seed alone changes nothing."""
        return dataclasses.replace(self, seed=0, unreachable_ns=0) == Wire()

    def control(self) -> dict[str, int]:
        """The fields of struct vmmc_control_wire, but for kind and from."""
        fields: dict[str, int] = {}
        for name in RANGES:
            value = getattr(self, name)
            if name in PROBABILITIES:
                fields[f"{name}_ppb"] = round(value * 10**9)
            else:
                fields[name] = int(value)
        return fields


PROBABILITIES = ("loss", "corrupt", "duplicate", "reorder")

# What each setting may be; also the order in which they are named to people.
RANGES: dict[str, tuple[int, int]] = {
    "up": (False, True),
    **dict.fromkeys(PROBABILITIES, (0, 1)),
    "delay_ns": (0, 60 * _SECOND_NS),
    "jitter_ns": (0, 60 * _SECOND_NS),
    "rate_bits_per_s": (0, 10**12),
    "limit_packets": (0, 65536),
    "seed": (0, 2**64 - 1),
    "unreachable_ns": (0, 86400 * _SECOND_NS),
    "stream_packet_ns": (0, _SECOND_NS),
    "stream_redirected_ps_per_byte": (0, 10**6),
    "stream_default_ps_per_byte": (0, 10**6),
}

# The least that some of them may be above 0, which stands for perfect or for a default.
LEAST: dict[str, float] = {
    **dict.fromkeys(PROBABILITIES, 1e-9),  # NICs are told them in billionths
    "unreachable_ns": 20 * 10**6,  # twice as long as it takes to send again what was lost first
}


def too_small(value: float, least: float) -> bool:
    """Whether a number is above 0 and less than the least; 9.999999999999999e-10 passes for 1e-9."""
    return value > 0 and round(value / least, 6) < 1


def _range(low: float, high: float) -> str:
    return "True or False" if isinstance(low, bool) else f"a number from {low} to {high}"


@dataclass(frozen=True)
class Change:
    """New settings of every wire from one of these nodes to another of those; a setting not named stays."""

    from_nodes: Sequence[int]
    to_nodes: Sequence[int]
    settings: Mapping[str, Any]
    reset: bool = False  # begin with a perfect wire instead of with the present one

    def as_json(self) -> dict[str, Any]:
        """As it goes to the supervisor."""
        return {
            "from": list(self.from_nodes), "to": list(self.to_nodes), "set": dict(self.settings),
            "reset": self.reset,
        }  # fmt: skip

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Change:
        """The inverse."""
        return cls(found["from"], found["to"], found["set"], bool(found["reset"]))

    def pairs(self, nodes: int) -> list[tuple[int, int]]:
        """The wires concerned, as (from, to); ClusterError for nodes that are not there."""
        for node in (*self.from_nodes, *self.to_nodes):
            if not isinstance(node, int) or not 0 <= node < nodes:
                last = node_name(nodes - 1)
                raise ClusterError(f"there is no node {node!r}: the cluster has node0 to {last}")
        found = [(a, b) for a in self.from_nodes for b in self.to_nodes if a != b]
        if not found:
            raise ClusterError("a node has no wire to itself: name two different nodes")
        return found


def change(place: ClusterPaths, changes: Sequence[Change]) -> None:
    """Changes wires of a running cluster: all of it or, with ClusterError or OSError, none.

    A ClusterError that says "written down" names nodes whose daemons are stopped or missing: it is in force
    on the others, and will be on these.
    """
    said = lifecycle.ask_supervisor(place, {"wires": [each.as_json() for each in changes]}, repeatable=True)
    if "errno" in said:
        raise OSError(said["errno"], said["message"]) if said["errno"] else ClusterError(said["message"])


def present(place: ClusterPaths) -> dict[tuple[int, int], Wire]:
    """Every wire that is not perfect, as (from, to): settings."""
    perfect = Wire()
    return {
        (sender, receiver): wire
        for path in place.wires.glob("node*.json")
        for receiver in [int(path.stem.removeprefix("node"))]
        for sender, wire in read(place, receiver).items()
        if wire != perfect
    }


def read(place: ClusterPaths, node: int) -> dict[int, Wire]:
    """Those that lead to one node and were ever changed, by the node at the other end."""
    try:
        text = place.wires_of(node).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    return {int(sender): _wire(tuple(settings.items())) for sender, settings in json.loads(text).items()}


# A large cluster has a million wires, most of them alike: equal ones are made, checked and written once.
@functools.lru_cache(maxsize=4096)
def _wire(settings: tuple[tuple[str, Any], ...]) -> Wire:
    return Wire(**dict(settings))


def write(place: ClusterPaths, wires: Mapping[int, Mapping[int, Wire]]) -> None:
    """Records the wires that lead to each of these nodes: none of it when there is no room for all."""
    drafts = []
    texts: dict[Wire, str] = {}
    try:
        for node, leading in wires.items():
            draft = place.wires_of(node).with_suffix(".draft")
            drafts.append((draft, place.wires_of(node)))
            entries = []
            for sender, wire in leading.items():
                text = texts.get(wire)
                if text is None:
                    text = texts[wire] = json.dumps(_named(wire))
                entries.append(f'"{sender}": {text}')
            draft.write_text("{" + ", ".join(entries) + "}", encoding="utf-8")
    except OSError as error:
        for draft, _ in drafts:
            draft.unlink(missing_ok=True)
        raise paths.not_recorded(place.wires, error, "no link was changed") from error
    for draft, path in drafts:
        draft.rename(path)


def _named(wire: Wire) -> dict[str, Any]:
    default = dataclasses.asdict(Wire())
    return {name: value for name, value in dataclasses.asdict(wire).items() if value != default[name]}
