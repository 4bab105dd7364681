"""Links as people set them: the command line, the Python API, profiles, partitions."""

from __future__ import annotations

import itertools
import json
import math
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmmc_emu import Cluster, wires
from vmmc_emu.errors import ClusterError
from vmmc_emu.wires import Wire

MS = 1_000_000


def _run(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "vmmc_emu.cli", "--cluster", cluster.name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _done(cluster: Cluster, *arguments: str) -> str:
    done = _run(cluster, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def cluster(eight_nodes: Cluster) -> Iterator[Cluster]:
    """A cluster of eight whose links are perfect before and after."""
    yield eight_nodes
    wires.change(eight_nodes.place, [wires.Change(range(8), range(8), {}, reset=True)])


def test_link_set_takes_the_words_of_netem(cluster: Cluster) -> None:
    """Both directions at once, what is not named stays, and what is shown can be set again."""
    words = ["loss", "1%", "corrupt", "0.1%", "duplicate", "2%", "reorder", "5%", "delay", "2ms", "jitter"]
    said = _done(cluster, "link", "set", "node0", "1", *words, "500us", "rate", "100mbit", "limit", "1000")
    expected = Wire(
        loss=0.01, corrupt=0.001, duplicate=0.02, reorder=0.05, delay_ns=2 * MS, jitter_ns=MS // 2,
        rate_bits_per_s=100_000_000, limit_packets=1000,
    )  # fmt: skip
    assert wires.present(cluster.place) == {(0, 1): expected, (1, 0): expected}
    shown = said.partition(": ")[2].split()
    _done(cluster, "link", "reset", "0", "1")
    assert wires.present(cluster.place) == {}
    _done(cluster, "link", "set", "0", "1", *shown)
    assert wires.present(cluster.place)[1, 0] == expected
    _done(cluster, "link", "set", "--one-way", "0", "1", "--seed", "7", "loss", "0%")
    assert wires.present(cluster.place)[0, 1] == Wire.checked(expected, {"loss": 0, "seed": 7})
    assert wires.present(cluster.place)[1, 0] == expected


def test_all_links_one_link_and_a_cut_link(cluster: Cluster) -> None:
    """`--all`, `down`, `up`, `show --json` and `reset`."""
    assert "every link: delay 1ms" in _done(cluster, "link", "set", "--all", "delay", "1ms")
    assert len(wires.present(cluster.place)) == 8 * 7
    assert "node2 ↔ node3: down delay 1ms" in _done(cluster, "link", "down", "2", "3")
    found = json.loads(_done(cluster, "link", "show", "3", "2", "--json"))
    assert [(each["from"], each["to"], each["settings"]["up"]) for each in found] == [
        ("node3", "node2", False), ("node2", "node3", False),
    ]  # fmt: skip
    assert found[0]["counters"]["wire_dropped"] == 0
    assert "node2 ↔ node3: delay 1ms" in _done(cluster, "link", "up", "2", "3")
    _done(cluster, "link", "reset")
    assert "perfect" in _done(cluster, "link", "show")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["0", "1", "loss", "101%"], ["loss", "'101%'", "0% to 100%"]),
        (["0", "1", "loss", "0.01"], ["loss", "'0.01'", "percent"]),
        (["0", "1", "delay", "3"], ["delay", "'3'", "ms"]),
        (["0", "1", "delay", "61s"], ["delay '61s'", "from 0 to 60s"]),
        (["0", "1", "rate", "fast"], ["rate", "'fast'", "mbit"]),
        (["0", "1", "limit", "many"], ["limit", "'many'"]),
        (["0", "1", "loss"], ["loss", "needs a value"]),
        (["0", "1", "loss", "1%", "loss", "2%"], ["loss", "twice"]),
        (["0", "1", "lost", "1%"], ["'lost'", "loss"]),
        (["0", "1", "loss", "-1%"], ["loss '-1%'", "from 0% to 100%"]),
        (["0", "1", "delay", "-2ms"], ["delay '-2ms'", "from 0 to 60s"]),
        (["0", "1", "rate", "-5mbit"], ["rate '-5mbit'", "from 0 to 1000gbit"]),
        (["0", "1", "rate", "2000gbit"], ["rate '2000gbit'", "from 0 to 1000gbit"]),
        (["0", "1", "limit", "-1"], ["limit '-1'", "from 0 to 65536"]),
        (["0", "1", "limit", "1.5"], ["limit '1.5'", "from 0 to 65536"]),
        (["0", "1", "seed", "abc"], ["seed 'abc'", "from 0 to 18446744073709551615"]),
        (["0", "1", "seed", "1" * 5000], ["seed", "from 0 to 18446744073709551615"]),
        (["0", "1", "rate", "0.1bit"], ["rate '0.1bit'", "too small", "0 or from 1bit to 1000gbit"]),
        (["0", "1", "delay", "0.1ns"], ["delay '0.1ns'", "too small", "0 or from 1ns to 60s"]),
        (["0", "1", "loss", "0.00000001%"], ["loss '0.00000001%'", "0% or from 0.0000001% to 100%"]),
        (["0", "1", "unreachable", "1ns"], ["unreachable '1ns'", "0 or from 20ms to 86400s"]),
        (["0", "1", "unreachable", "long"], ["unreachable 'long'", "0 or from 20ms to 86400s"]),
        (["0", "1", "redirected-rate", "fast"], ["redirected-rate 'fast'", "from 8mbit to 8000gbit"]),
        (["0", "1", "redirected-rate", "1bit"], ["redirected-rate '1bit'", "from 8mbit to 8000gbit"]),
        (["0", "1", "default-rate", "9000gbit"], ["default-rate '9000gbit'", "from 8mbit to 8000gbit"]),
        (["0", "1", "jitter", "5ms"], ["jitter", "5ms", "delay (here 0)"]),
        (["0", "1", "jitter", "5ms", "delay", "1.5ms"], ["jitter", "5ms", "delay (here 1.5ms)"]),
        (["0", "1", "down"], ["vmmc-emu link down"]),
        (["--all", "0", "1", "loss", "1%"], ["--all", "no nodes"]),
        (["0", "1"], ["say what to set"]),
        (["0"], ["two nodes"]),
        (["0", "8", "loss", "1%"], ["node8", "node7"]),
        (["1", "node1", "loss", "1%"], ["itself"]),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(
    cluster: Cluster, arguments: list[str], words: list[str]
) -> None:
    """The value and its range, in one line."""
    done = _run(cluster, "link", "set", *arguments)
    assert done.returncode != 0
    for word in words:
        assert word in done.stderr
    assert wires.present(cluster.place) == {}


def test_links_from_python(cluster: Cluster) -> None:
    """Numbers are probabilities, seconds and bits a second; text has units."""
    link = cluster.link(0, "node1")
    link.set(loss=0.25, delay=0.002, rate="1gbit").set(one_way=True, jitter="1ms")
    base = Wire(loss=0.25, delay_ns=2 * MS, rate_bits_per_s=10**9)
    assert link.wires() == {(0, 1): Wire.checked(base, {"jitter_ns": MS}), (1, 0): base}
    link.down(one_way=True)
    assert [wire.up for wire in link.wires().values()] == [False, True]
    assert link.up().reset().wires() == {(0, 1): Wire(), (1, 0): Wire()}
    assert link.counters()[1, 0]["packets_resent"] == 0
    for settings, words in ({"loss": 2}, "loss.*2"), ({"speed": 1}, "speed.*rate"), ({"loss": True}, "loss"):
        with pytest.raises(ClusterError, match=words):
            link.set(**settings)
    with pytest.raises(ClusterError, match="itself"):
        cluster.link(3, 3)


@pytest.mark.parametrize(
    ("word", "value", "limits"),
    [
        *[(word, value, "from 0% to 100%") for word in ("loss", "reorder") for value in (math.inf, math.nan)],
        *[("delay", value, "from 0 to 60s") for value in (math.inf, -math.inf, math.nan)],
        *[("rate", value, "from 0 to 1000gbit") for value in (math.inf, math.nan)],
        *[("limit", value, "from 0 to 65536") for value in (math.inf, math.nan)],
        *[("packet_cost", value, "from 0 to 1s") for value in (math.inf, math.nan)],
        *[("redirected_rate", value, "from 8mbit to 8000gbit") for value in (math.inf, math.nan, 1e14, 1)],
        ("default_rate", -1e9, "from 8mbit to 8000gbit"),
        ("loss", 1e-12, "from 0.0000001% to 100%"),
        ("delay", 1e-10, "from 1ns to 60s"),
        ("rate", 0.5, "from 1bit to 1000gbit"),
        ("unreachable", 0.001, "from 20ms to 86400s"),
        ("delay", [3], "from 0 to 60s"),
        # Python makes no float of the first, and no text of the others.
        pytest.param("delay", 10**400, "from 0 to 60s", id="delay-digits"),
        pytest.param("rate", -(10**5000), "from 0 to 1000gbit", id="rate-digits"),
        pytest.param("limit", 10**5000, "from 0 to 65536", id="limit-digits"),
    ],
)
def test_numbers_that_cannot_be(two_nodes: Cluster, word: str, value: Any, limits: str) -> None:
    """Not numbers, too large, or so small that they would mean 0: the word and its range are named."""
    with pytest.raises(ClusterError) as failed:
        two_nodes.link(0, 1).set(**{word: value})
    assert str(failed.value).startswith(word.replace("_", "-"))
    assert limits in str(failed.value)
    assert wires.present(two_nodes.place) == {}


def test_the_least_and_the_most_can_be_shown_and_set_again(cluster: Cluster) -> None:
    """What is in an error as a range can be set."""
    for words in (
        ["loss", "0.0000001%", "delay", "60s", "jitter", "1ns", "rate", "1bit", "unreachable", "20ms"],
        ["redirected-rate", "8mbit", "default-rate", "8000gbit"],
        ["loss", "100%", "delay", "2.000001ms", "rate", "1000gbit", "unreachable", "86400s"],
    ):
        said = _done(cluster, "link", "set", "0", "1", *words)
        before = wires.present(cluster.place)
        shown = said.partition(": ")[2].split()
        assert shown == words
        _done(cluster, "link", "reset", "0", "1")
        _done(cluster, "link", "set", "0", "1", *shown)
        assert wires.present(cluster.place) == before
        _done(cluster, "link", "reset", "0", "1")


def test_a_partition_and_its_end(cluster: Cluster) -> None:
    """Between groups nothing gets through, and heal leaves other settings as they are."""
    cluster.link(0, 1).set(loss="1%")
    assert _done(cluster, "partition", "{0,1,2}", "3-7") == "{0,1,2} | {3,4,5,6,7}\n"
    cut = {pair for pair, wire in wires.present(cluster.place).items() if not wire.up}
    assert cut == {(a, b) for a in range(8) for b in range(8) if (a < 3) != (b < 3)}
    cluster.partition([0, "node7"])  # the others are the other side
    cut = {pair for pair, wire in wires.present(cluster.place).items() if not wire.up}
    assert cut == {(a, b) for a in range(8) for b in range(8) if (a in (0, 7)) != (b in (0, 7))}
    _done(cluster, "heal")
    assert wires.present(cluster.place) == {(0, 1): Wire(loss=0.01), (1, 0): Wire(loss=0.01)}
    for groups, words in ((["0-7"], "two groups"), (["0-3", "3-7"], "node3"), (["0-8"], "node8")):
        done = _run(cluster, "partition", *groups)
        assert done.returncode != 0
        assert words in done.stderr


@pytest.mark.parametrize(
    "groups", ["{0,1,2} {3,4,5,6,7}", "node{0,1} node{2,3}", "{0..2} {3..7}", "{0,1,2} 3-7", "{0,1}"]
)
def test_braces_that_a_shell_took_away(cluster: Cluster, groups: str) -> None:
    """They were meant as groups: nothing is cut, and it is said what to write."""
    command = f'"$0" -P -m vmmc_emu.cli --cluster {cluster.name} partition {groups}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    for words in ("quote them", "'{0,1,2}'", "0-2 3-7", "'{0}' '{1}' '{2}'"):
        assert words in done.stderr
    assert wires.present(cluster.place) == {}


def test_braces_that_are_quoted(cluster: Cluster) -> None:
    """A group of one node is one on purpose then; braces come in pairs, around all of a group."""
    for word in ("{0,1", "2}", "{0,1}}", "{", "node{0,1}"):
        done = _run(cluster, "partition", word, "3-7")
        assert done.returncode != 0
        assert repr(word) in done.stderr
        assert "braces" in done.stderr
    assert "empty" in _run(cluster, "partition", "{}", "3-7").stderr
    assert wires.present(cluster.place) == {}
    assert _done(cluster, "partition", "{0}", "{1}", "{2}") == "{0} | {1} | {2} | {3,4,5,6,7}\n"
    assert _done(cluster, "partition", "0", "1-7") == "{0} | {1,2,3,4,5,6,7}\n"
    cluster.partition([0], [1], [2], [3], [4], [5], [6], [7])
    assert len(wires.present(cluster.place)) == 8 * 7


def test_one_change_of_wires_that_differ(cluster: Cluster) -> None:
    """Each keeps what it had; where one cannot have it none is changed."""
    pairs = list(itertools.permutations(range(8), 2))
    cluster.link(0, 1).set(delay="1ms")
    cluster.link(2, 3).set(one_way=True, delay="5ms", seed=7)
    cluster.link(4, 5).down()
    before = {pair: wires.present(cluster.place).get(pair, Wire()) for pair in pairs}
    assert len(set(before.values())) == 4
    _done(cluster, "link", "set", "--all", "loss", "1%")
    expected = {pair: Wire.checked(wire, {"loss": 0.01}) for pair, wire in before.items()}
    assert wires.present(cluster.place) == expected
    refused = _run(cluster, "link", "set", "--all", "jitter", "2ms")
    assert (refused.returncode, "jitter" in refused.stderr) == (1, True)
    assert wires.present(cluster.place) == expected
    _done(cluster, "link", "set", "--all", "delay", "3ms", "jitter", "2ms")
    assert wires.present(cluster.place)[2, 3] == Wire(loss=0.01, delay_ns=3 * MS, jitter_ns=2 * MS, seed=7)
    assert wires.present(cluster.place)[4, 5] == Wire(
        up=False, loss=0.01, delay_ns=3 * MS, jitter_ns=2 * MS
    )


def test_more_changes_at_once_than_a_message_holds(tmp_path: Path) -> None:
    """A profile that names each link of a large cluster, its halves, a group a node, and heal."""
    nodes = 48
    pairs = [(a, b) for a in range(nodes) for b in range(a)]
    profile = tmp_path / "each.toml"
    profile.write_text(
        "".join(f'[[link]]\nbetween = ["{a}", "{b}"]\ndelay = "{a * nodes + b}us"\n' for a, b in pairs)
    )
    expected = {pair: Wire(delay_ns=(a * nodes + b) * 1000) for a, b in pairs for pair in ((a, b), (b, a))}
    with Cluster(nodes=nodes, name=f"test-{secrets.token_hex(6)}", profile=str(profile)) as cluster:
        assert wires.present(cluster.place) == expected
        for groups in ((range(24), range(24, 48)), [[node] for node in range(nodes)]):
            cluster.partition(*groups)
            cut = {pair for pair, wire in wires.present(cluster.place).items() if not wire.up}
            within = {pair for group in groups for pair in itertools.permutations(group, 2)}
            assert cut == expected.keys() - within
            cluster.heal()
            assert wires.present(cluster.place) == expected
        # The last of many is wrong: none is done.  Far more than is reasonable is refused as what it is.
        many = [wires.Change([0], [1], {"up": False})] * 5000
        with pytest.raises(ClusterError, match="no node 99"):
            wires.change(cluster.place, [*many, wires.Change([0], [99], {"up": False})])
        with pytest.raises(ClusterError, match="ask in parts"):
            wires.change(cluster.place, [wires.Change([0], [1], {"x" * (33 << 20): 1})])
        assert wires.present(cluster.place) == expected


def test_programs_on_both_sides_of_a_partition(cluster: Cluster) -> None:
    """Who is on the same side goes on; who is not gets through again after the end of it."""
    code = "import socket; s = socket.create_server(('0.0.0.0', 7000)); print('ready', flush=True)\n"
    code += "while True: s.accept()[0].sendall(b'x')"
    with cluster.node(1).popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            cluster.partition([0, 1])
            fetch = "import socket; print(socket.create_connection(('node1', 7000)).recv(1))"
            assert "b'x'" in cluster.node(0).run([sys.executable, "-c", fetch], check=True).stdout
            other = cluster.node(2).popen(
                [sys.executable, "-c", f"print('trying', flush=True)\n{fetch}"],
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            with other:
                assert other.stdout is not None
                assert other.stdout.readline() == "trying\n"
                while not cluster.link(2, 1).counters()[2, 1]["wire_dropped"]:  # it asked, in vain
                    assert other.poll() is None
                cluster.heal()
                assert other.stdout.readline() == "b'x'\n"
        finally:
            server.kill()


def test_profiles(tmp_path: Path) -> None:
    """A shipped one by name, a file with exceptions, and errors that say where."""
    name = f"test-{secrets.token_hex(6)}"
    with Cluster(nodes=2, name=name, profile="wan") as cluster:
        assert wires.present(cluster.place)[1, 0].delay_ns == 20 * MS
    file = tmp_path / "mine.toml"
    file.write_text('[all]\ndelay = "1ms"\n[[link]]\nbetween = ["0", "node1"]\nloss = "1%"\n'
                    '[[link]]\nfrom = "2"\nto = "0-1"\nrate = 8000\n')  # fmt: skip
    command = [sys.executable, "-P", "-m", "vmmc_emu.cli", "--cluster", name]
    up = [*command, "up", "--nodes", "3", "--profile", str(file)]
    assert subprocess.run(up, capture_output=True, timeout=60, check=False).returncode == 0
    try:
        found = wires.present(Cluster.running(name).place)
    finally:
        subprocess.run([*command, "down"], capture_output=True, timeout=60, check=True)
    assert found[0, 1] == found[1, 0] == Wire(delay_ns=MS, loss=0.01)
    assert found[2, 1] == found[2, 0] == Wire(delay_ns=MS, rate_bits_per_s=8000)
    assert found[0, 2] == Wire(delay_ns=MS)
    # Each can be, and both together cannot: known when it is up, and it is down again then.
    file.write_text(
        '[all]\ndelay = "2ms"\njitter = "2ms"\n[[link]]\nbetween = ["0", "1"]\ndelay = "1ms"\n'
    )
    done = subprocess.run(up, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "mine.toml: jitter" in done.stderr
    with pytest.raises(ClusterError, match="is not up"):
        Cluster.running(name)
    up[-1] = "no"
    done = subprocess.run(up, capture_output=True, text=True, timeout=60, check=False)
    assert "lan-1gbit" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[all]\nloss = '200%'", "loss"),
        ("[every]", "every"),
        ("x =", "value"),
        ("[all]\ndelay = inf", "delay inf: out of range, from 0 to 60s"),
        ("[all]\ndelay = nan", "delay nan: out of range, from 0 to 60s"),
        ("[all]\nrate = 1e400", "rate inf"),
        pytest.param(f"[all]\nlimit = {'1' * 5000}", "digits", id="digits"),
        pytest.param(f"[all]\nlimit = 0x{'1' * 5000}", "limit inf", id="hexadecimal-digits"),
        ("[all]\ndelay = [3]", "delay [3]"),
        ("link = [3]", "[[link]]"),
        ("link = 3", "[[link]]"),
        ("all = 3", "[all]"),
        ("[[link]]\nloss = 0.1", "between"),
        ('[[link]]\nfrom = ["0", "1"]\nto = "2"', "from"),
        ('[[link]]\nfrom = "0"', "from"),
        ('[[link]]\nfrom = true\nto = "2"', "from"),
        ('[[link]]\nbetween = ["0", "1"]\nto = "2"', "between"),
        ('[[link]]\nbetween = ["0", ["1"]]', "between"),
        ('[[link]]\nbetween = ["0", "3"]', "node3"),
        ('[[link]]\nfrom = 7\nto = "0"', "node7"),
        pytest.param(f"[[link]]\nfrom = '{'7' * 5000}'\nto = '0'", "not a node", id="node-digits"),
        ('[[link]]\nbetween = ["0", "one"]', "'one'"),
        ('[[link]]\nbetween = ["1", "1"]', "itself"),
    ],
)
def test_a_file_that_cannot_be_a_profile(tmp_path: Path, text: str, words: str) -> None:
    """One line names the file and says what is wrong; nothing is started."""
    name = f"test-{secrets.token_hex(6)}"
    file = tmp_path / "mine.toml"
    file.write_text(text)
    command = [sys.executable, "-P", "-m", "vmmc_emu.cli", "--cluster", name, "up", "--nodes", "3"]
    done = subprocess.run(
        [*command, "--profile", str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: profile {file}: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    with pytest.raises(ClusterError, match="is not up"):
        Cluster.running(name)


def test_no_profile_at_all() -> None:
    """An empty name is none: a variable that was not set, as a rule."""
    name = f"test-{secrets.token_hex(6)}"
    command = [sys.executable, "-P", "-m", "vmmc_emu.cli", "--cluster", name]
    up = [*command, "up", "--profile", ""]
    done = subprocess.run(up, capture_output=True, text=True, timeout=60, check=False)
    subprocess.run([*command, "down"], capture_output=True, timeout=60, check=True)
    assert done.returncode != 0
    assert "--profile is empty" in done.stderr
    with pytest.raises(ClusterError, match="no profile ''"), Cluster(nodes=2, name=name, profile=""):
        pass
