"""Links as people speak of them: `loss 1% delay 2ms rate 100mbit`, partitions, and profiles in files.

    cluster.link(0, 1).set(loss=0.01, delay="2ms", rate="100mbit")     # both directions
    cluster.link(0, 1).set(loss=0.01, one_way=True)                    # node0 to node1 only
    cluster.link(0, 1).down()
    cluster.partition([0, 1, 2], [3, 4, 5, 6, 7])
    cluster.heal()

The words are those of tc-netem(8).  A setting is given as a number in the unit of the table below, or as
text with a unit.  A link is two wires, one each way: see vmmc_emu.wires, which checks ranges and carries out.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmmc_emu import wires
from vmmc_emu.errors import ClusterError
from vmmc_emu.names import node_index, node_name, node_set
from vmmc_emu.paths import ClusterPaths
from vmmc_emu.wires import Change, Wire

Value = str | int | float
Pair = tuple[int, int]

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(.*)")
# As tc has them: "bps" is bytes a second.
_RATES = {
    "bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "bps": 8.0, "kbps": 8e3, "mbps": 8e6, "gbps": 8e9,
}  # fmt: skip
_BITS = {unit: scale for unit, scale in _RATES.items() if unit.endswith("bit")}
_BYTE_S = 8e12  # picoseconds a byte, times bits a second


def _split(text: str) -> tuple[float, str] | None:
    found = _NUMBER.fullmatch(text.strip().lower())
    return (float(found[1]), found[2]) if found else None


# What people wrote, as a number that is not yet rounded: see Setting.


def _probability(name: str, value: Value) -> float:
    if not isinstance(value, str):
        return value
    parts = _split(value)
    if parts is None or parts[1] != "%" or parts[0] > 100:
        raise ClusterError(f"{name} {value!r}: write percent, from 0% to 100%, as in '{name} 1%'")
    return parts[0] / 100


def _with_unit(name: str, text: str, what: str, units: Mapping[str, float]) -> float:
    parts = _split(text)
    if parts == (0.0, ""):
        return 0
    if parts is None or parts[1] not in units:
        raise ClusterError(
            f"{name} {text!r}: write {what} with its unit, {', '.join(units)}{_range_of(name)}, as in"
            f" '{name} {_EXAMPLES[name]}'"
        )
    return parts[0] * units[parts[1]]


def _time_ns(name: str, value: Value) -> float:
    return _with_unit(name, value, "a time", wires.TIMES) if isinstance(value, str) else value * 1e9


def _rate(name: str, value: Value) -> float:
    return _with_unit(name, value, "a rate", _RATES) if isinstance(value, str) else value


def _count(name: str, value: Value) -> int:
    if isinstance(value, int):
        return value
    # Thirty digits are out of every range; Python refuses to read some thousands.
    if not (isinstance(value, str) and re.fullmatch("[0-9]{1,30}", value)):
        raise ClusterError(f"{name} {value!r}: write a whole number{_range_of(name)}")
    return int(value)


def _percent(value: float) -> str:
    return f"{value * 100:.7f}".rstrip("0").rstrip(".") + "%"


def _show_time(value: float) -> str:
    return wires.in_units(value, wires.TIMES)


def _show_rate(value: float) -> str:
    return wires.in_units(value, _BITS)


@dataclass(frozen=True)
class Setting:
    """One word of `link set`."""

    field: str  # of Wire
    read: Callable[[str, Value], float]  # in the field's unit, or bits a second
    show: Callable[[Any], str]
    meaning: str
    inverse: bool = False  # written as a rate, and kept as the time that a byte takes

    def kept(self, written: float) -> float:
        """As a Wire has it."""
        if self.field in wires.PROBABILITIES or not written:
            return written
        return round(_BYTE_S / written if self.inverse else written)

    def shown(self, kept: float) -> str:
        """As people write what a Wire has."""
        # Six digits of a rate tell any two such times apart.
        return self.show(float(f"{_BYTE_S / kept:.6g}") if self.inverse and kept else kept)

    def limits(self) -> tuple[float, float]:
        """The least above 0 and the most, as they are written."""
        least, most = wires.LEAST.get(self.field, 1), wires.RANGES[self.field][1]
        return (_BYTE_S / most, _BYTE_S / least) if self.inverse else (least, most)


# By the word; a number instead of text is in the unit that stands in brackets.
SETTINGS = {
    "loss": Setting("loss", _probability, _percent, "packets that are lost, 0% to 100% [probability]"),
    "corrupt": Setting("corrupt", _probability, _percent, "packets in which bits are flipped [probability]"),
    "duplicate": Setting("duplicate", _probability, _percent, "packets that come twice [probability]"),
    "reorder": Setting("reorder", _probability, _percent, "packets that later ones overtake [probability]"),
    "delay": Setting("delay_ns", _time_ns, _show_time, "from end to end, up to 60s [seconds]"),
    "jitter": Setting("jitter_ns", _time_ns, _show_time, "delay varies by so much, either way [seconds]"),
    "rate": Setting("rate_bits_per_s", _rate, _show_rate, "up to 1000gbit a second; 0: no limit [bit/s]"),
    "limit": Setting(
        "limit_packets", _count, str, "packets under way at a time, the next is dropped; 0: no limit"
    ),
    "unreachable": Setting(
        "unreachable_ns",
        _time_ns,
        _show_time,
        "silence after which a peer is given up, 20ms or more; 0: 10s [seconds]",
    ),
    "seed": Setting("seed", _count, str, "of all random decisions: the same seed, the same faults"),
    "packet-cost": Setting(
        "stream_packet_ns",
        _time_ns,
        _show_time,
        "slow receivers, as in 1997: time for each packet of a stream [seconds]",
    ),
    "redirected-rate": Setting(
        "stream_redirected_ps_per_byte",
        _rate,
        _show_rate,
        "likewise: at which bytes of a stream reach a posted address [bit/s]",
        inverse=True,
    ),
    "default-rate": Setting(
        "stream_default_ps_per_byte",
        _rate,
        _show_rate,
        "likewise: at which those do that are copied once more [bit/s]",
        inverse=True,
    ),
}


def understood(settings: Mapping[str, Value]) -> dict[str, Any]:
    """Fields of a Wire, from words and values of people; ClusterError for what cannot be understood."""
    found: dict[str, Any] = {}
    for given, value in settings.items():
        word = given.replace("_", "-")
        if word not in SETTINGS:
            raise ClusterError(f"a link has no {given!r}: it has {', '.join(SETTINGS)}")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ClusterError(f"{word} {value!r}: write a number, or text with a unit{_range_of(word)}")
        setting = SETTINGS[word]
        found[setting.field] = _read(word, setting, _fit(value))
    return found


def _fit(value: Value) -> Value:
    """Infinity for a number so large that Python would neither make it a float nor show it."""
    if isinstance(value, int) and abs(value) > 10**100:
        return math.inf if value > 0 else -math.inf
    return value


def _read(word: str, setting: Setting, value: Value) -> float:
    read = setting.read(word, value)
    least, most = setting.limits()
    if not 0 <= read <= most:  # nor is a NaN
        raise ClusterError(f"{word} {value!r}: out of range{_range_of(word)}")
    if wires.too_small(read, least):
        raise ClusterError(f"{word} {value!r}: too small{_range_of(word, above_0=True)}")
    return setting.kept(read)


def _range_of(word: str, *, above_0: bool = False) -> str:
    """", from 0 to 60s", for errors; above_0: with the least that is not 0, when that is of interest."""
    setting = SETTINGS[word]
    least, most = setting.limits()
    if above_0 or least > 1:
        return f", {setting.show(0)} or from {setting.show(least)} to {setting.show(most)}"
    return f", from {setting.show(0)} to {setting.show(most)}"


def words(text: Sequence[str]) -> dict[str, Value]:
    """`["loss", "1%", "delay", "2ms"]` as settings."""
    settings: dict[str, Value] = {}
    for at in range(0, len(text), 2):
        word = text[at]
        if word in ("down", "up"):
            raise ClusterError(f"'{word}' is a command of its own: vmmc-emu link {word}")
        if word not in SETTINGS:
            raise ClusterError(f"a link has no {word!r}: it has {', '.join(SETTINGS)}")
        if word in settings:
            raise ClusterError(f"{word} is given twice")
        if at + 1 == len(text):
            raise ClusterError(f"{word} needs a value, as in '{word} {_EXAMPLES.get(word, '1')}'")
        settings[word] = text[at + 1]
    return settings


_EXAMPLES = {
    "loss": "1%", "corrupt": "0.1%", "duplicate": "1%", "reorder": "5%", "delay": "2ms", "jitter": "500us",
    "rate": "100mbit", "limit": "1000", "unreachable": "5s", "packet-cost": "5us",
    "redirected-rate": "100mbps", "default-rate": "40mbps",
}  # fmt: skip


def shown(wire: Wire) -> str:
    """A wire's settings in the words that `link set` takes; "perfect" when there is nothing to say."""
    default = Wire()
    parts = [] if wire.up else ["down"]
    for word, setting in SETTINGS.items():
        value = getattr(wire, setting.field)
        if value != getattr(default, setting.field):
            parts.append(f"{word} {setting.shown(value)}")
    return " ".join(parts) or "perfect"


# ---- links of a cluster ----


class Link:
    """The two wires between two nodes of a running cluster."""

    def __init__(self, place: ClusterPaths, a: int, b: int) -> None:
        if a == b:
            raise ClusterError("a node has no link to itself: name two different nodes")
        self._place, self._ends = place, (a, b)

    def __repr__(self) -> str:
        return f"<Link {node_name(self._ends[0])} - {node_name(self._ends[1])} of {self._place.cluster!r}>"

    def _change(self, fields: Mapping[str, Any], *, one_way: bool, reset: bool = False) -> Link:
        wires.change(self._place, [Change([a], [b], fields, reset) for a, b in self._pairs(one_way)])
        return self

    def _pairs(self, one_way: bool) -> list[Pair]:
        return [self._ends] if one_way else [self._ends, self._ends[::-1]]

    def set(self, *, one_way: bool = False, **settings: Value) -> Link:
        """Changes what is named, in both directions or from the first node to the second only.

        `loss=0.01` or `loss="1%"`, `delay=0.002` or `delay="2ms"`, `rate=100e6` or `rate="100mbit"`: see
        SETTINGS.  ClusterError names a value that cannot be, and then nothing has changed.  It takes effect
        on live traffic.
        """
        return self._change(understood(settings), one_way=one_way)

    def reset(self, *, one_way: bool = False) -> Link:
        """Makes it perfect again."""
        return self._change({}, one_way=one_way, reset=True)

    def down(self, *, one_way: bool = False) -> Link:
        """Nothing gets through; what was not delivered waits for `up` until the peer is given up."""
        return self._change({"up": False}, one_way=one_way)

    def up(self, *, one_way: bool = False) -> Link:
        """Lets packets through again; other settings are as they were."""
        return self._change({"up": True}, one_way=one_way)

    def wires(self) -> dict[Pair, Wire]:
        """Settings by direction, as (from, to)."""
        found = wires.present(self._place)
        return {pair: found.get(pair, Wire()) for pair in self._pairs(one_way=False)}

    def counters(self) -> dict[Pair, dict[str, int]]:
        """What happened on each of the two wires: losses, retransmissions, round trip."""
        from vmmc_emu import observe  # noqa: PLC0415  the command line starts faster without

        return {
            (a, b): observe.link_counters(self._place.cluster, a, b) for a, b in self._pairs(one_way=False)
        }


def _without_braces(text: str) -> str:
    inner = text[1:-1] if text.startswith("{") and text.endswith("}") else text
    if "{" in inner or "}" in inner:
        raise ClusterError(f"{text!r}: braces go around a group, as in '{{0,1,2}}', or write 0,1,2")
    return inner


def groups_of(texts: Sequence[str | Iterable[int | str]], nodes: int) -> list[list[int]]:
    """Groups of nodes from "0,1,2", "{0,1,2}", "3-7" or lists; those that nobody named are one more."""
    found: list[list[int]] = []
    where: dict[int, int] = {}
    for given in texts:
        if isinstance(given, str):
            inner = _without_braces(given)
            group = node_set([inner], nodes) if inner.strip() else []
        else:
            group = [node_index(each, nodes) for each in given]
        for node in group:
            if where.setdefault(node, len(found)) != len(found):
                raise ClusterError(f"{node_name(node)} is in two groups: a partition has each node in one")
        if not group:
            raise ClusterError("a group of a partition is empty: name nodes, as in 0-2 or 0,1,2")
        found.append(group)
    rest = [node for node in range(nodes) if node not in where]
    if rest:
        found.append(rest)
    if len(found) < 2:
        raise ClusterError("a partition needs two groups, as in: partition 0-2 3-7")
    return found


def partition(place: ClusterPaths, groups: Sequence[Sequence[int]]) -> None:
    """Cuts every wire between two groups and mends those within one."""
    changes = []
    for group in groups:
        others = [node for other in groups if other is not group for node in other]
        changes.append(Change(list(group), others, {"up": False}))
        if len(group) > 1:
            changes.append(Change(list(group), list(group), {"up": True}))
    wires.change(place, changes)


def heal(place: ClusterPaths) -> None:
    """Mends every wire that is down; their other settings stay."""
    cut: dict[int, list[int]] = {}
    for (sender, receiver), wire in sorted(wires.present(place).items()):
        if not wire.up:
            cut.setdefault(sender, []).append(receiver)
    # A partition left as many different ones as it had groups.
    alike: dict[tuple[int, ...], list[int]] = {}
    for sender, receivers in cut.items():
        alike.setdefault(tuple(receivers), []).append(sender)
    if alike:
        wires.change(place, [Change(senders, to, {"up": True}) for to, senders in alike.items()])


# ---- profiles ----

_SHIPPED = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class Profile:
    """Settings for every wire, and for some of them others, as a file says them."""

    path: Path
    every: Mapping[str, Any]
    links: Sequence[tuple[str, str, bool, Mapping[str, Any]]]  # from, to, also back, settings

    def changes(self, nodes: int) -> list[Change]:
        """What makes the wires of a new cluster so; ClusterError when it names nodes that are not there."""
        found = [Change(range(nodes), range(nodes), self.every)] if self.every and nodes > 1 else []
        for senders, receivers, back, settings in self.links:
            try:
                a, b = node_set([senders], nodes), node_set([receivers], nodes)
                found.append(Change(a, b, settings))
                if back:
                    found.append(Change(b, a, settings))
                found[-1].pairs(nodes)  # there are some
            except ClusterError as error:
                raise ClusterError(f"profile {self.path}: {error}") from None
        return found


def shipped_profiles() -> list[str]:
    """The names that need no file."""
    return sorted(path.stem for path in _SHIPPED.glob("*.toml"))


def profile(which: str) -> Profile:
    """A shipped profile by name, or one in a file (TOML); ClusterError says what is wrong with it."""
    path = _SHIPPED / f"{which}.toml"
    if which not in shipped_profiles():
        path = Path(which)
        if not path.is_file():
            raise ClusterError(
                f"there is no profile {which!r}: name a file, or one of {', '.join(shipped_profiles())}"
            )
    try:
        return _profile(path, tomllib.loads(path.read_text(encoding="utf-8")))
    # ValueError: no TOML, no UTF-8, or a number with thousands of digits.
    except (ValueError, RecursionError, ClusterError) as error:
        raise ClusterError(f"profile {path}: {error}") from None


def _profile(path: Path, found: Mapping[str, Any]) -> Profile:
    unknown = found.keys() - {"all", "link"}
    if unknown:
        raise ClusterError(f"it has {', '.join(sorted(unknown))}: write [all] and [[link]]")
    every, links = found.get("all", {}), found.get("link", [])
    if not isinstance(every, dict) or not isinstance(links, list):
        raise ClusterError("write [all] once and [[link]], in double brackets, for each link that differs")
    return Profile(path, _checked(every), [_link(each) for each in links])


def _link(found: object) -> tuple[str, str, bool, Mapping[str, Any]]:
    what = ClusterError('a [[link]] needs between = ["0", "1"], or from = "0" and to = "1-3"')
    if not isinstance(found, dict):
        raise what
    settings = {word: value for word, value in found.items() if word not in {"between", "from", "to"}}
    one_way = [found[word] for word in ("from", "to") if word in found]
    back = "between" in found
    ends = found["between"] if back else one_way
    if not isinstance(ends, list) or len(ends) != 2 or (back and one_way):
        raise what
    if not all(_names_nodes(each) for each in ends):
        raise what
    return str(ends[0]), str(ends[1]), back, _checked(settings)


def _names_nodes(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    fields = understood(settings)
    Wire.checked(Wire(), fields)
    return fields
