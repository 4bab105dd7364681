"""The vmmc-emu command: reads arguments, calls the library, prints."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
from click.shell_completion import CompletionItem

from vmmc_emu import lifecycle, names, paths
from vmmc_emu.terminal import byte_count, duration, explained, show_json, show_lines, table

# Colours of nodes, in turn: those that are readable on dark and on light terminals.
_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red", "bright_cyan", "bright_magenta")

# Commands that live in modules of their own, loaded when they are used.
_ELSEWHERE = {
    "bench": ("vmmc_emu.bench_cli", "bench", "Measure: programs under VMMC beside the kernel's TCP."),
    "node": ("vmmc_emu.node_cli", "node", "Take the power from nodes, or give it back."),
    "link": ("vmmc_emu.link_cli", "link", "Lose, damage, delay or cut what goes from node to node."),
    "partition": ("vmmc_emu.link_cli", "partition", "Split the cluster into groups of nodes."),
    "heal": ("vmmc_emu.link_cli", "heal", "Mend every link that is down."),
    "demo": ("vmmc_emu.demo_cli", "demo", "Show what this is for, on a cluster of its own."),
}

_ORDER = ("up", "status", "run", "ps", "logs", "stats", "node", "link", "partition", "heal", "down", "demo",
          "bench", "doctor", "completion")  # fmt: skip


class _Commands(click.Group):
    """The commands in the order in which people meet them, and typing mistakes answered with a guess."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        known = {*super().list_commands(ctx), *_ELSEWHERE}
        return [name for name in _ORDER if name in known] + sorted(known - set(_ORDER))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _ELSEWHERE:
            module, attribute, _ = _ELSEWHERE[cmd_name]
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            if name in _ELSEWHERE:  # without loading it
                rows.append((name, _ELSEWHERE[name][2]))
            elif command := self.get_command(ctx, name):
                rows.append((name, command.get_short_help_str(80)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _complete_cluster(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    found = {place.cluster for place in paths.known_clusters()}
    return [CompletionItem(name) for name in sorted(found) if name.startswith(begun)]


def _complete_node(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    parent = context.parent
    name = (parent.params.get("cluster") if parent else None) or names.default_cluster()
    try:
        count = lifecycle.describe(paths.cluster_paths(name)).nodes
    except OSError:
        return []
    return [CompletionItem(str(node)) for node in range(count) if str(node).startswith(begun)]


def _command(cluster: str) -> str:
    return "vmmc-emu" if cluster == names.DEFAULT_CLUSTER else f"vmmc-emu --cluster {cluster}"


def _complete_profile(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    from vmmc_emu import links  # noqa: PLC0415  other commands start faster without

    found = [CompletionItem(name) for name in links.shipped_profiles() if name.startswith(begun)]
    return [*found, CompletionItem(begun, type="file")]


# ---- the command itself ----


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option(
    "--cluster", metavar="NAME", shell_complete=_complete_cluster,
    help="Which cluster; VMMC_CLUSTER says it too.  [default: default]",
)  # fmt: skip
@click.version_option(package_name="vmmc-emu", prog_name="vmmc-emu")
@click.pass_context
@explained
def main(context: click.Context, cluster: str | None) -> None:
    """A PC cluster with a user-level network (VMMC), emulated on this machine, without root.

    Unmodified programs run on its nodes; their TCP sockets are carried by VMMC, not by the kernel.

    \b
      vmmc-emu up --nodes 4
      vmmc-emu run --node 0 --detach -- python3 -m http.server 8000
      vmmc-emu run --node 3 -- curl http://node0:8000/
      vmmc-emu ps --sockets
      vmmc-emu down
    """
    # https://no-color.org: whatever its value, unless it is empty.
    if os.environ.get("NO_COLOR"):
        context.color = False
    context.obj = paths.cluster_paths(names.default_cluster() if cluster is None else cluster)


@main.command()
@click.option(
    "--nodes", type=int, default=names.NODES_DEFAULT, show_default=True, help="How many, 1 to 1024."
)
@click.option(
    "--profile", metavar="NAME|FILE", shell_complete=_complete_profile,
    help="How links are from the start: perfect, lan-1gbit, wan, myrinet-1997, or a file.",
)  # fmt: skip
@click.pass_obj
@explained
def up(place: paths.ClusterPaths, nodes: int, profile: str | None) -> None:
    """Start a cluster in the background.

    Returns when every node is ready.

    \b
      vmmc-emu up
      vmmc-emu --cluster other up --nodes 64
      vmmc-emu up --nodes 4 --profile wan
    """
    if profile == "":
        raise click.UsageError("--profile is empty: name one, or a file, or leave it out")
    lifecycle.start(place, nodes, profile=profile)
    status = lifecycle.status(place)
    show_lines(_node_table(status, with_state=False))
    command = _command(place.cluster)
    last = nodes - 1
    click.echo(
        f"\nCluster '{place.cluster}' is up.  Next:\n"
        f"  {command} run --node 0 --detach -- python3 -m http.server 8000\n"
        f"  {command} run --node {last} -- curl http://node0:8000/\n"
        f"  {command} ps --sockets\n"
        f"  {command} down"
    )


def _node_table(status: dict[str, Any], *, with_state: bool) -> Iterator[str]:
    head = ["NODE", "ADDRESS", *(["ADDRESS6", "STATE"] if with_state else []), "DAEMON", "NIC"]
    rows = [
        [
            node["name"],
            node["address"],
            *([node["address6"], node["state"]] if with_state else []),
            node["daemon_pid"] or "-",
            node["nic_pid"] or "-",
        ]
        for node in status["nodes"]
    ]
    return table(head, rows, right=(len(head) - 2, len(head) - 1))


@main.command()
@click.option("--all", "every", is_flag=True, help="Every cluster of this user.")
@click.pass_obj
@explained
def down(place: paths.ClusterPaths, every: bool) -> None:
    """End a cluster and remove every trace of it.

    Its programs are asked to end and, after two seconds, forced to.  Fine when nothing is up, and for
    what is left of a cluster whose processes were killed.
    """
    places = paths.known_clusters() if every else [place]
    ended = [each.cluster for each in places if lifecycle.stop(each)]
    for name in ended:
        click.echo(f"Cluster '{name}' is down.")
    if not ended:
        click.echo("No cluster is up." if every else f"Cluster '{place.cluster}' was not up.")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
@explained
def status(place: paths.ClusterPaths, as_json: bool) -> None:
    """Show the nodes: addresses, processes, state."""
    found = lifecycle.status(place)
    if as_json:
        show_json(found)
        return
    click.echo(f"Cluster '{place.cluster}': {found['state']}, started {duration(found['uptime_s'])} ago")
    if found["state"] == "down":
        click.echo(f"All its processes were killed; `{_command(place.cluster)} down` removes what is left.")
    if found["state"] == "unsupervised":
        click.echo("Its supervisor was killed: traffic goes on, and a daemon is starting the next one.")
    if found["state"] == "abandoned":
        click.echo(
            "Its supervisor and daemons were killed: traffic goes on, and nobody brings them back;"
            f" `{_command(place.cluster)} up` starts it anew, `down` removes what is left."
        )
    show_lines(_node_table(found, with_state=True))
    if lost := lifecycle.lost_nodes(place, found):
        click.echo(_mending(place, lost, found))
    if stopped := found["stopped_pids"]:
        click.echo(_stopped(stopped, found))
    replaced = [("", "supervisor", found["supervisor_restarts"])] + [
        (node["name"], "NIC" if what == "nic" else what, node["restarts"][what])
        for node in found["nodes"]
        for what in ("daemon", "nic")
    ]
    rows = [
        [node, what, each["count"], f"{duration(max(0.0, time.time() - last['when']))} ago", last["how"]]
        for node, what, each in replaced
        for last in each["recent"][:1]
    ]
    if rows:
        click.echo()
        show_lines(table(["NODE", "REPLACED", "TIMES", "LAST", "WHY"], rows, right=(2,)))


def _mending(place: paths.ClusterPaths, lost: list[int], found: dict[str, Any]) -> str:
    """What it means that nodes have lost their daemons for good, and what can be done."""
    with_nic = all(found["nodes"][node]["nic_pid"] for node in lost)
    meaning = (
        "what runs there goes on, and no other program can attach" if with_nic
        else "no other program can attach, and one without a NIC has no network at all"
    )  # fmt: skip
    command, which = f"{_command(place.cluster)} node", ",".join(map(str, lost))
    return (
        f"{', '.join(map(names.node_name, lost))}: the daemon and the supervisor died together: {meaning};"
        f" `{command} kill {which}` and then `{command} start {which}` mend it, and end what runs there."
    )


def _stopped(pids: list[int], found: dict[str, Any]) -> str:
    """Who was stopped by a signal, and how to let it go on."""
    whose = {found["supervisor_pid"]: "the supervisor"}
    for node in found["nodes"]:
        whose[node["daemon_pid"]] = f"{node['name']}'s daemon"
        whose[node["nic_pid"]] = f"{node['name']}'s NIC"
    return (
        f"Stopped by a signal: {', '.join(whose.get(pid, f'process {pid}') for pid in pids)};"
        f" `kill -CONT {' '.join(map(str, pids))}` lets {'it' if len(pids) == 1 else 'them'} go on."
    )


# ---- programs ----


@main.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@click.option(
    "--node", "nodes", multiple=True, metavar="NODES", shell_complete=_complete_node,
    help="Where: 3, node3, 0,2,5 or 0-3; may be repeated.",
)  # fmt: skip
@click.option("--all", "every", is_flag=True, help="On every node.")
@click.option("--chdir", metavar="DIR", help="Run there; made when missing, {node} is the node's name.")
@click.option("--detach", is_flag=True, help="Return at once; `vmmc-emu logs` shows the output.")
@click.option(
    "--publish", "published", multiple=True, metavar="HOST:NODE",
    help="Lead the host's port HOST (0: any) to the program's port NODE; also ADDRESS:HOST:NODE.",
)  # fmt: skip
@click.option(
    "--diagnose", is_flag=True, help="Let programs explain what fork and exec did to their sockets."
)
@click.argument(
    "command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- PROGRAM [ARGUMENTS]..."
)
@click.pass_obj
@explained
def run(
    place: paths.ClusterPaths,
    nodes: tuple[str, ...],
    every: bool,
    chdir: str | None,
    detach: bool,
    published: tuple[str, ...],
    diagnose: bool,
    command: tuple[str, ...],
) -> None:
    """Run an unmodified program on a node, or on several.

    On one node it has this terminal, and its exit status is ours (128 + n for a signal n).  On several,
    its lines of output carry the node's name, Ctrl-C ends all, and the exit status is that of the first
    that failed.  {node} in an argument becomes the node's name.

    \b
      vmmc-emu run --node 0 -- bash
      vmmc-emu run --node 1-3 -- curl -s http://node0:8000/
      vmmc-emu run --all --detach --chdir /tmp/redis-{node} -- redis-server
      vmmc-emu run --node 0 --publish 8080:80 -- python3 -m http.server 80
    """
    from vmmc_emu import programs  # noqa: PLC0415  other commands start faster without

    count = lifecycle.describe_running(place).nodes
    if every and nodes:
        raise click.UsageError("--all is every node: leave --node out")
    if not every and not nodes:
        raise click.UsageError("say where: --node 3, --node 0-3 or --all")
    chosen = list(range(count)) if every else names.node_set(nodes, count)
    publications = [programs.Publication.parse(text) for text in published]
    if publications and (every or len(chosen) > 1):
        raise click.UsageError("a published port leads to one node: name one with --node")
    prepared = [
        programs.prepare(place, count, node, command, directory=chdir, diagnose=diagnose) for node in chosen
    ]
    lost = programs.no_room_for_logs(place) if detach else None
    for line in [*programs.warnings(prepared[0]), *([lost] if lost else [])]:
        click.echo(f"Warning: {line}", err=True)
    listeners = [(each, each.listen()) for each in publications]
    try:
        if detach:
            _run_detached(programs, prepared, listeners)
        elif len(prepared) == 1 and not every:
            _run_one(programs, prepared[0], listeners)
        else:
            sys.exit(programs.run_everywhere(prepared, _line_writer(len(names.node_name(max(chosen))))))
    except programs.NotStarted as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.status)


def _run_one(programs: Any, program: Any, listeners: list[Any]) -> None:
    helpers: list[int] = []

    def started(pid: int) -> None:
        for publication, listener in listeners:
            helpers.append(programs.publish_foreground(program, pid, publication, listener))
            _say_published(program, publication, listener)

    status = programs.run_foreground(program, started if listeners else None)
    for helper in helpers:
        os.waitpid(helper, 0)  # it ends with the program, when what is on its way has been delivered
    sys.exit(status)


def _run_detached(programs: Any, prepared: list[Any], listeners: list[Any]) -> None:
    for program in prepared:
        pid, log = programs.detach(program)
        name = names.node_name(program.node)
        click.echo(
            f"{name}: {program.arguments[0]} runs as pid {pid};"
            f" output: {_command(program.place.cluster)} logs --node {program.node}"
        )
        for publication, listener in listeners:
            programs.publish_detached(program, pid, publication, listener, log)
            _say_published(program, publication, listener)


def _say_published(program: Any, publication: Any, listener: Any) -> None:
    address, port = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    click.echo(
        f"{shown}:{port} leads to port {publication.node_port} of {names.node_name(program.node)}", err=True
    )


def _line_writer(width: int) -> Callable[[int, bytes, bool], None]:
    """Writes lines with the node's name in front, in colour where it is read by a person."""

    def write(node: int, line: bytes, error: bool) -> None:
        stream = sys.stderr if error else sys.stdout
        prefix = f"{names.node_name(node):<{width}} | "
        if stream.isatty() and not os.environ.get("NO_COLOR"):
            prefix = click.style(prefix, fg=_COLOURS[node % len(_COLOURS)])
        data = memoryview(prefix.encode() + line)
        while data:  # a signal (a program's end, say) cuts a write short
            data = data[os.write(stream.fileno(), data) :]

    return write


@main.command()
@click.option(
    "--node", "nodes", multiple=True, metavar="NODES", shell_complete=_complete_node, help="Only these."
)
@click.option("--follow", "-f", is_flag=True, help="Go on with what is added, until Ctrl-C.")
@click.option(
    "--level", type=click.Choice(["info", "warning", "error"]), default="info",
    help="Of supervisor, daemons and NICs, only lines of this level and above.",
)  # fmt: skip
@click.pass_obj
@explained
def logs(place: paths.ClusterPaths, nodes: tuple[str, ...], follow: bool, level: str) -> None:
    """Show what detached programs, daemons and NICs have written.

    Each line begins with whose it is.  Those of the supervisor, of daemons and of NICs have a time (UTC)
    and a level; of many that are alike in ten seconds, some are written and the rest is counted.
    """
    from vmmc_emu import follow as following  # noqa: PLC0415
    from vmmc_emu import observe  # noqa: PLC0415

    count = lifecycle.describe(place).nodes
    chosen = set(names.node_set(nodes, count)) if nodes else None
    if follow:
        try:
            show_lines(following.follow(place, chosen, level))
        except KeyboardInterrupt:
            sys.exit(130)
        return
    for log in observe.logs(place, chosen):
        show_lines(observe.log_lines(log, level))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--sockets", is_flag=True, help="Every VMMC socket, as `ss` would show it.")
@click.pass_obj
@explained
def ps(place: paths.ClusterPaths, as_json: bool, sockets: bool) -> None:
    """Show the programs on the nodes, or their sockets."""
    from vmmc_emu import observe  # noqa: PLC0415

    count = lifecycle.describe(place).nodes
    found = observe.programs(place, count, with_sockets=sockets)
    if as_json:
        show_json({"cluster": place.cluster, "programs": found})
        return
    if not sockets:
        rows = [
            [
                each["node"],
                each["pid"],
                byte_count(each["memory_bytes"]),
                f"{each['cpu_percent']:.1f}",
                f"{each['cpu_s']:.2f} s",
                each["command"],
            ]
            for each in found
        ]  # fmt: skip
        show_lines(table(["NODE", "PID", "MEMORY", "CPU%", "CPU", "COMMAND"], rows, right=(1, 2, 3, 4)))
        return
    rows = [
        [
            each["node"],
            *(socket[key] for key in ("state", "receive_queue", "send_queue", "local", "peer")),
            f"{_program_name(each['command'])} ({each['pid']})",
        ]
        for each in found
        for socket in each["sockets"]
    ]  # fmt: skip
    show_lines(table(["NODE", "STATE", "RECV-Q", "SEND-Q", "LOCAL", "PEER", "PROGRAM"], rows, right=(2, 3)))


def _program_name(command: str) -> str:
    return os.path.basename(command.split(" ", 1)[0])


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option(
    "--node", "nodes", multiple=True, metavar="NODES", shell_complete=_complete_node, help="Only these."
)
@click.option("--explain", is_flag=True, help="Say what each counter counts.")
@click.pass_obj
@explained
def stats(place: paths.ClusterPaths, as_json: bool, nodes: tuple[str, ...], explain: bool) -> None:
    """Show the counters of NICs and programs.

    They are read from shared memory; nothing is asked and nobody disturbed.
    """
    from vmmc_emu import observe  # noqa: PLC0415

    count = lifecycle.describe(place).nodes
    chosen = names.node_set(nodes, count) if nodes else list(range(count))
    explained = {node: observe.counters_explained(place.cluster, node) for node in chosen}
    if as_json:
        found = {
            names.node_name(node): {name: value for name, _, value in each}
            for node, each in explained.items()
        }
        show_json({"cluster": place.cluster, "nodes": found})
        return
    meanings = explained[chosen[0]]
    head = ["COUNTER", *map(names.node_name, chosen), *(["MEANING"] if explain else [])]
    rows = [
        [name, *(explained[node][i][2] for node in chosen), *([meaning] if explain else [])]
        for i, (name, meaning, _) in enumerate(meanings)
    ]
    show_lines(table(head, rows, right=range(1, len(chosen) + 1)))


# ---- the machine ----


@main.command()
@explained
def doctor() -> None:
    """Check what this machine must offer, and say how to mend what is missing."""
    from vmmc_emu import limits  # noqa: PLC0415

    bad = 0
    for finding in limits.doctor():
        bad += not finding.ok
        mark = click.style("ok  ", fg="green") if finding.ok else click.style("FAIL", fg="red", bold=True)
        click.echo(f"{mark}  {finding.what}: {finding.found}")
        if finding.advice:
            click.echo(f"      {finding.advice}")
    if bad:
        raise click.ClickException(f"{bad} of these must be mended before a cluster can work")
    click.echo("Everything that a cluster needs is there.")


_COMPLETION = {
    "bash": ('eval "$(_VMMC_EMU_COMPLETE=bash_source vmmc-emu)"', "~/.bashrc"),
    "zsh": ('eval "$(_VMMC_EMU_COMPLETE=zsh_source vmmc-emu)"', "~/.zshrc"),
    "fish": ("_VMMC_EMU_COMPLETE=fish_source vmmc-emu | source", "~/.config/fish/completions/vmmc-emu.fish"),
}


@main.command()
@click.argument("shell", type=click.Choice(sorted(_COMPLETION)))
def completion(shell: str) -> None:
    """Print the line that turns on completion, for the shell's start-up file.

    \b
      vmmc-emu completion bash >> ~/.bashrc
    """
    line, file = _COMPLETION[shell]
    click.echo(f"# vmmc-emu: completion, for {file}\n{line}")


if __name__ == "__main__":
    main(prog_name="vmmc-emu")
