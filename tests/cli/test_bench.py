"""`vmmc-emu bench`: what it measures and how it says so; never how fast anything was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

Cli = Any  # conftest.Cli

BOTH = ["vmmc", "tcp"]
HAS_REDIS = all(map(shutil.which, ("redis-server", "redis-benchmark")))
PATHS = {
    "latency-1": [*BOTH, "unix"],
    "latency-4k": [*BOTH, "unix"],
    "bandwidth-64k": [*BOTH, "unix"],
    "bandwidth-1m": [*BOTH, "unix"],
    "bandwidth-1460": [*BOTH, "unix"],
    "writes-64": [*BOTH, "unix"],
    "connect": BOTH,
    "loaded-latency-1": [*BOTH, "unix"],
    "loaded-bandwidth-64k": [*BOTH, "unix"],
    **({"redis-50": BOTH, "redis-1": BOTH} if HAS_REDIS else {}),
    "ring-2": BOTH,
    "idle": ["vmmc"],
}


def test_all(up: Cli) -> None:
    done = up(
        "bench", "all", "--vs", "tcp,unix", "--rounds", 1, "--seconds", 0.01, "--ring", 2,
        "--idle-seconds", 0.05, "--json", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {row["name"]: row for row in report["rows"]}
    assert {name: [p for p in ("vmmc", "tcp", "unix") if p in row] for name, row in rows.items()} == PATHS
    for name, row in rows.items():
        for path in PATHS[name]:
            assert len(row[path]["rounds"]) == 1
            assert row[path]["median"] > 0 or name == "idle"
    assert rows["connect"]["times_better_than_tcp"] > 0
    assert set(report["skipped"]) == (set() if HAS_REDIS else {"redis"})
    assert report["machine"].keys() >= {"cores", "others_cpu", "steal"}
    assert "measured " in done.stderr  # progress, where it is in nobody's way


def test_some_rows(up: Cli) -> None:
    some = ("--only", "connect,latency-4k", "--only", "latency-1")
    report = json.loads(up.ok("bench", "all", "--rounds", 1, "--seconds", 0.01, *some, "--json"))
    assert [row["name"] for row in report["rows"]] == ["latency-1", "latency-4k", "connect"]
    done = up("bench", "all", "--only", "smoke", "--ring", 2)
    assert done.returncode == 2
    assert "--only smoke: no such row" in done.stderr
    assert all(name in done.stderr for name in PATHS)


def test_table_bars_and_noise() -> None:
    from vmmc_emu import bench_all

    figures = iter((5.0, 20.0, 30.0, 7.0))  # the second round begins with the other path
    take = lambda _: next(figures)  # noqa: E731
    row = bench_all.Row("latency-1", "latency", "µs", True, {"vmmc": take, "tcp": take})
    machine = bench_all.measure_rows([row], rounds=2, seconds=0)
    assert row.figures == {"vmmc": [5, 7], "tcp": [20, 30]}
    table = list(bench_all.as_table([row]))
    assert table[1].split() == ["latency,", "µs", "6", "(5", "to", "7)", "25", "(20", "to", "30)", "x4.2"]
    title, ours, theirs = bench_all.as_bars([row])
    assert "less is better" in title
    assert 0 < ours.count("█") < theirs.count("█")
    assert "spread by 37% of their median, 40% at worst" in bench_all.as_noise([row], machine)


def test_a_path_that_is_not_there(cli: Cli) -> None:
    done = cli("bench", "all", "--vs", "tcp,smoke")
    assert done.returncode == 2
    assert "'smoke' is not a path" in done.stderr


def test_redirection(up: Cli) -> None:
    arguments = ("--rounds", 1, "--seconds", 0.05, "--size", 65536, "--json")
    report = json.loads(up.ok("bench", "redirection", *arguments))
    assert [(row["pattern"], row["size"]) for row in report["rows"]] == [("asked", 65536), ("stream", 65536)]
    for row in report["rows"]:
        assert row["without"]["redirected"] == 0
        assert row["without"]["copies_per_byte"] == 2  # into the default buffer, and out of it
        # How many bytes find a receive posted depends on the machine; each one that does is copied once.
        ours = row["with"]
        assert abs(ours["copies_per_byte"] + ours["redirected"] - 2) < 0.01
        assert ours["gb_s"]["median"] > 0
    from vmmc_emu import bench_all

    assert list(bench_all.redirection_table(report))[-1].split()[0] == "65536"


def test_paper(up: Cli, tmp_path: Path) -> None:
    """The curves of 1997, on a cluster of its own: every figure is there, and both plots."""
    prefix = tmp_path / "curves"
    sizes = ("--size", 4, "--size", 65536)
    done = up("bench", "paper", "--rounds", 1, "--seconds", 0.02, *sizes, "--plot", prefix, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [each["published"] for each in report["headlines"]] == [20, 84, 13.5, 90]
    assert all(each["measured"] > 0 for each in report["headlines"])
    names = {f"{kind} {way}" for kind in ("latency", "bandwidth") for way in ("redirected", "copied", "vmmc")}
    assert report["curves"].keys() == names
    assert all(curve.keys() == {"4", "65536"} for curve in report["curves"].values())
    assert prefix.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in prefix.with_suffix(".svg").read_text()
    # 1997's wire and memory are slow: 65536 bytes last, and the copy can be seen, on any machine of today.
    latency = report["curves"]
    assert latency["latency vmmc"]["65536"][0] > 65536 / 90
    assert latency["latency copied"]["65536"][0] > 65536 / 90 + 65536 / 60


def test_paper_says_first_where_it_cannot_draw(up: Cli) -> None:
    done = up("bench", "paper", "--plot", "/nowhere/at/all")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "/nowhere/at" in done.stderr
    assert "--plot" in done.stderr
