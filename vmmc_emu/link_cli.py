"""`vmmc-emu link`, `partition` and `heal`: faults on the wires between nodes, from the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click

from vmmc_emu import lifecycle, links, names, observe, wires
from vmmc_emu.errors import ClusterError
from vmmc_emu.links import Pair
from vmmc_emu.paths import ClusterPaths
from vmmc_emu.terminal import explained, show_json, show_lines, table
from vmmc_emu.wires import Change, Wire

_BARE_NODE = re.compile("(node)?[0-9]+")
_SHOWN_COUNTERS = ("wire_dropped", "wire_corrupted", "wire_duplicated", "wire_reordered", "packets_resent")


@click.group("link")
def link() -> None:
    """Lose, damage, double, delay or cut what goes from node to node.

    A link is two wires, one each way.  Programs see what a reliable link makes of it: delays, lower
    bandwidth, and ETIMEDOUT when the other side stays silent for too long.

    \b
      vmmc-emu link set node0 node1 loss 1% delay 2ms jitter 500us
      vmmc-emu link set --all rate 100mbit limit 1000
      vmmc-emu link set --one-way node0 node1 corrupt 0.1%
      vmmc-emu link down node0 node1
      vmmc-emu link show
      vmmc-emu link reset
    """


def _settings_help() -> str:
    lines = ["Change some settings of a link, and leave the others as they are.", "", "\b"]
    for word, setting in links.SETTINGS.items():
        lines.append(f"  {word:<16} {setting.meaning.partition(' [')[0]}")
    lines += [
        "",
        "Every random decision is a function of the seed, the link, its direction, the packet's number and"
        " the attempt: the same seed gives the same faults.",
        "",
        "\b",
        "  vmmc-emu link set node0 node1 loss 1% delay 2ms",
        "  vmmc-emu link set --all rate 100mbit --seed 7",
    ]
    return "\n".join(lines)


def _ends(arguments: Sequence[str], count: int, *, every: bool) -> tuple[list[Pair], list[str]]:
    """The links that are meant (one direction of each), and the arguments that remain."""
    if every:
        if arguments and (arguments[0].isdecimal() or arguments[0].startswith("node")):
            raise click.UsageError("--all is every link: name no nodes")
        return [(a, b) for a in range(count) for b in range(a)], list(arguments)
    if len(arguments) < 2:
        raise click.UsageError("name the two nodes of the link, as in node0 node1, or --all")
    a, b = (names.node_index(each, count) for each in arguments[:2])
    if a == b:
        raise ClusterError("a node has no link to itself: name two different nodes")
    return [(a, b)], list(arguments[2:])


def _change(
    place: ClusterPaths, arguments: Sequence[str], fields: Mapping[str, Any], *, every: bool, one_way: bool,
    reset: bool = False,
) -> None:  # fmt: skip
    count = lifecycle.describe_running(place).nodes
    pairs, rest = _ends(arguments, count, every=every)
    if every and one_way:
        raise click.UsageError("--all is both directions of every link: leave --one-way out")
    fields = {**fields, **links.understood(links.words(rest))}
    if not fields and not reset:
        raise click.UsageError(f"say what to set: {', '.join(links.SETTINGS)}")
    if every:
        wires.change(place, [Change(range(count), range(count), fields, reset)])
    else:
        both = pairs if one_way else [*pairs, *(pair[::-1] for pair in pairs)]
        wires.change(place, [Change([a], [b], fields, reset) for a, b in both])
    show_lines(_settings_table(place, count, pairs))


_one_way = click.option("--one-way", is_flag=True, help="Only from the first node to the second.")
_every = click.option("--all", "every", is_flag=True, help="Every link of the cluster.")
_nodes = click.argument("nodes", nargs=-1, metavar="[NODE NODE]")


# Unknown options are arguments here: "loss -1%" is to be told its range, and not that there is no option -1.
@link.command("set", help=_settings_help(), context_settings={"ignore_unknown_options": True})
@_every
@_one_way
@click.option("--seed", metavar="NUMBER", help="Of all random decisions; also as a setting.")
@click.argument("arguments", nargs=-1, metavar="[NODE NODE] SETTING VALUE ...")
@click.pass_obj
@explained
def set_(
    place: ClusterPaths, every: bool, one_way: bool, seed: str | None, arguments: tuple[str, ...]
) -> None:
    """Changes settings of a link (help: above)."""
    fields = {} if seed is None else links.understood({"seed": seed})
    _change(place, arguments, fields, every=every, one_way=one_way)


def _switch(name: str, up: bool, text: str) -> None:
    """Adds `link down` or `link up`."""

    @link.command(name, help=text)
    @_every
    @_one_way
    @_nodes
    @click.pass_obj
    @explained
    def command(place: ClusterPaths, every: bool, one_way: bool, nodes: tuple[str, ...]) -> None:
        _only_nodes(nodes)
        _change(place, nodes, {"up": up}, every=every, one_way=one_way)


_switch("down", False, "Cut a link: nothing gets through until `up`.")
_switch("up", True, "Mend a link that was cut; its other settings are as they were.")


@link.command()
@_one_way
@_nodes
@click.pass_obj
@explained
def reset(place: ClusterPaths, one_way: bool, nodes: tuple[str, ...]) -> None:
    """Make a link perfect again, or every link when none is named."""
    _only_nodes(nodes)
    _change(place, nodes, {}, every=not nodes, one_way=one_way, reset=True)


def _only_nodes(nodes: Sequence[str]) -> None:
    if len(nodes) > 2:
        raise click.UsageError("a link has two nodes; settings are for `link set`")


@link.command()
@_nodes
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
@explained
def show(place: ClusterPaths, nodes: tuple[str, ...], as_json: bool) -> None:
    """Show how links are set and what happened on them: those that are not perfect, or one."""
    _only_nodes(nodes)
    count = lifecycle.describe_running(place).nodes
    present = wires.present(place)
    if nodes:
        (pair,), _ = _ends(nodes, count, every=False)
        pairs = [pair, pair[::-1]]
    else:
        pairs = sorted(present)
    if as_json:
        show_json([_entry(place, present, pair) for pair in pairs])
        return
    if not pairs:
        click.echo("Every link is perfect: `vmmc-emu link set --help` says what can be changed.")
        return
    rows = []
    for pair in pairs:
        counters = observe.link_counters(place.cluster, *pair)
        trip = counters["round_trip_ns"]
        rows.append(
            [
                _wire(pair),
                *(counters[name] for name in _SHOWN_COUNTERS),
                f"{trip / 1e6:.3g} ms" if trip else "-",
                links.shown(present.get(pair, Wire())),
            ]
        )
    head = ["WIRE", "LOST", "DAMAGED", "DOUBLED", "REORDERED", "RESENT", "ROUND TRIP", "SETTINGS"]
    show_lines(table(head, rows, right=range(1, 7)))


def _entry(place: ClusterPaths, present: Mapping[Pair, Wire], pair: Pair) -> dict[str, Any]:
    return {
        "from": names.node_name(pair[0]),
        "to": names.node_name(pair[1]),
        "settings": asdict(present.get(pair, Wire())),
        "counters": observe.link_counters(place.cluster, *pair),
    }


def _wire(pair: Pair, arrow: str = "→") -> str:
    return f"{names.node_name(pair[0])} {arrow} {names.node_name(pair[1])}"


def _settings_table(place: ClusterPaths, count: int, pairs: Sequence[Pair]) -> Iterator[str]:
    """How these links are set now; in one line when all are the same."""
    present = wires.present(place)
    both = [(present.get((a, b), Wire()), present.get((b, a), Wire())) for a, b in pairs]
    if len(pairs) > 1 and len({wire for each in both for wire in each}) == 1:
        what = "every link" if len(pairs) == count * (count - 1) // 2 else f"{len(pairs)} links"
        yield f"{what}: {links.shown(both[0][0])}"
        return
    for pair, (there, back) in zip(pairs, both, strict=True):
        if there == back:
            yield f"{_wire(pair, '↔')}: {links.shown(there)}"
        else:
            yield f"{_wire(pair)}: {links.shown(there)}"
            yield f"{_wire(pair[::-1])}: {links.shown(back)}"


@click.command("partition")
@click.argument("groups", nargs=-1, required=True, metavar="NODES NODES ...")
@click.pass_obj
@explained
def partition(place: ClusterPaths, groups: tuple[str, ...]) -> None:
    """Split the cluster: nodes reach those of their own group only.

    Nodes that are not named are one more group.  `heal` ends it.

    Quote braces: a shell takes them away and makes a group of each node.  Several bare nodes that would
    make three groups or more are refused for that reason.

    \b
      vmmc-emu partition 0-2 3-7
      vmmc-emu partition 0,2,4              the rest is the other side
      vmmc-emu partition '{0,1}' '{2,3}'    quoted
      vmmc-emu partition '{0}' '{1}' '{2}'  each of these by itself
    """
    count = lifecycle.describe_running(place).nodes
    found = links.groups_of(groups, count)
    bare = [each for each in groups if _BARE_NODE.fullmatch(each)]
    if len(found) > 2 and len(bare) > 1:
        raise click.UsageError(
            f"{', '.join(bare)}: groups of one node each, as when a shell has taken braces away: quote them,"
            " as in '{0,1,2}' '{3,4}', or write 0,1,2 or 0-2 3-7.  To isolate each node on purpose:"
            " '{0}' '{1}' '{2}', which a shell leaves as they are."
        )
    links.partition(place, found)
    click.echo(" | ".join("{" + ",".join(map(str, group)) + "}" for group in found))


@click.command("heal")
@click.pass_obj
@explained
def heal(place: ClusterPaths) -> None:
    """Mend every link that is down, whatever cut it; other settings stay."""
    lifecycle.describe_running(place)
    links.heal(place)
    click.echo("No link is down.")
