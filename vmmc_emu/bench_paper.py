"""The curves of 1997: latency and bandwidth of stream sockets with and without redirection, and of VMMC.

They are measured on a cluster whose links are the profile myrinet-1997, in real time, and set beside the
headline figures that were published of stream sockets on VMMC over Myrinet.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from vmmc_emu.bench import KINDS, over_vmmc, short
from vmmc_emu.bench import Path as Way
from vmmc_emu.bench_all import Progress
from vmmc_emu.cluster import Cluster
from vmmc_emu.errors import ClusterError
from vmmc_emu.paths import native_file

PROFILE = "myrinet-1997"
SIZES = tuple(4 << shift for shift in range(0, 19, 2))  # 4 B to 1 MiB


@dataclass(frozen=True)
class Headline:
    """A published figure, and which of ours stands beside it."""

    title: str
    unit: str
    published: float
    curve: str
    of: Callable[[Sequence[float]], float]  # which point of the curve


def _of_the_smallest(curve: Sequence[float]) -> float:
    return curve[0]


HEADLINES = (
    Headline("stream sockets, one-way latency", "µs", 20.0, "latency redirected", _of_the_smallest),
    Headline("stream sockets, peak bandwidth", "MB/s", 84.0, "bandwidth redirected", max),
    Headline("VMMC, one-way latency", "µs", 13.5, "latency vmmc", _of_the_smallest),
    Headline("VMMC, peak bandwidth", "MB/s", 90.0, "bandwidth vmmc", max),
)

# By name: what the curve is called in a plot.
CURVES = {
    "redirected": "sockets, redirection",
    "copied": "sockets, no redirection",
    "vmmc": "VMMC sends",
}
UNITS = {"latency": "µs", "bandwidth": "MB/s"}


@dataclass
class Report:
    """Figures of every round, by curve ("latency redirected") and size."""

    rounds: int
    sizes: tuple[int, ...]
    figures: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    def add(self, curve: str, size: int, figure: float) -> None:
        """One more round's figure."""
        self.figures.setdefault(curve, {}).setdefault(size, []).append(figure)

    def curve(self, name: str) -> list[float]:
        """Medians, a size each."""
        return [median(self.figures[name][size]) for size in self.sizes]

    def headlines(self) -> Iterator[tuple[Headline, float]]:
        """Each published figure with ours."""
        for headline in HEADLINES:
            yield headline, headline.of(self.curve(headline.curve))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "bench": "paper", "profile": PROFILE, "rounds": self.rounds, "sizes": self.sizes,
            "headlines": [
                {"title": each.title, "unit": each.unit, "published": each.published, "measured": ours}
                for each, ours in self.headlines()
            ],
            "curves": {
                name: {str(size): rounds for size, rounds in of.items()} for name, of in self.figures.items()
            },
        }  # fmt: skip

    def as_table(self) -> Iterator[str]:
        """Lines for a terminal."""
        yield f"{'':<34}{'published':>12}{'here':>10}"
        for each, ours in self.headlines():
            yield f"{each.title + ', ' + each.unit:<34}{each.published:>12g}{ours:>10.1f}"
        for measure, unit in UNITS.items():
            yield ""
            names = [name for name in CURVES if f"{measure} {name}" in self.figures]
            yield f"{measure + ', ' + unit:>15}" + "".join(f"{CURVES[name]:>26}" for name in names)
            for at, size in enumerate(self.sizes):
                line = "".join(f"{short(self.curve(f'{measure} {name}')[at]):>26}" for name in names)
                yield f"{size:>13} B{line}"


def _vmmc(cluster: Cluster, size: int, seconds: float) -> dict[str, float]:
    command = [str(native_file("vmmc-bench-vmmc")), cluster.name, "--size", str(size), "--rounds", "1"]
    done = subprocess.run(
        [*command, "--seconds", f"{seconds:.4f}"], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise ClusterError(f"vmmc-bench-vmmc ended with status {done.returncode}: {done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(
    *,
    rounds: int = 3,
    sizes: Sequence[int] = SIZES,
    seconds: float = 0.2,
    profile: str = PROFILE,
    progress: Progress = lambda done, total, what: None,
) -> Report:
    """Measures all curves on a cluster of two nodes of its own, `seconds` each."""
    report = Report(rounds, tuple(sorted(sizes)))
    name = f"paper-{secrets.token_hex(4)}"
    with Cluster(nodes=2, name=name, profile=profile) as cluster, contextlib.ExitStack() as stack:
        ways: dict[str, Way] = {
            "redirected": over_vmmc(cluster, stack, env={"VMMC_REDIRECT_ORDINARY": "1"}),
            "copied": over_vmmc(cluster, stack, env={"VMMC_REDIRECT_ORDINARY": "never"}),
        }
        total, done = rounds * len(report.sizes) * (2 * len(ways) + 1), 0
        for _ in range(rounds):
            for size in report.sizes:
                for way, path in ways.items():
                    for kind in UNITS:
                        progress(done, total, f"{kind}, {CURVES[way]}, {size} B")
                        figure = KINDS[kind].figure(path.run(KINDS[kind].mode, size, seconds))
                        report.add(f"{kind} {way}", size, figure * (1 if kind == "latency" else 1e3))
                        done += 1
                progress(done, total, f"{CURVES['vmmc']}, {size} B")
                found = _vmmc(cluster, size, seconds)
                report.add("latency vmmc", size, found["one_way_us"])
                report.add("bandwidth vmmc", size, found["send"] / 1e6)
                done += 1
        progress(done, total, "")
    return report


def check_plot(prefix: Path) -> None:
    """ClusterError when a plot could not be drawn there: asked before minutes are spent on measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ClusterError(
            "drawing needs matplotlib: pip install 'vmmc-emu[plot]', or leave the plot out with --no-plot"
        )
    if not os.access(prefix.parent, os.W_OK):
        raise ClusterError(f"cannot write a plot into {prefix.parent}: name another place with --plot")


def plot(report: Report, prefix: Path) -> list[Path]:
    """Draws the curves into PREFIX.png and PREFIX.svg, whose names it returns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  only plots need it
    from matplotlib.figure import Figure  # noqa: PLC0415

    colours = {"redirected": "#0072b2", "copied": "#d55e00", "vmmc": "#009e73"}  # told apart by everybody
    markers = {"redirected": "o", "copied": "s", "vmmc": "^"}
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = dict(zip(UNITS, figure.subplots(1, len(UNITS)), strict=True))
    for kind, axes in panels.items():
        for name, title in CURVES.items():
            axes.plot(
                report.sizes, report.curve(f"{kind} {name}"), label=title,
                color=colours[name], marker=markers[name], markersize=5,
            )  # fmt: skip
        for each in HEADLINES:
            measured, name = each.curve.split()
            if measured == kind:
                axes.axhline(each.published, color=colours[name], linestyle="--", linewidth=1)
                axes.annotate(
                    f"published: {each.published:g} {each.unit}", (report.sizes[0], each.published),
                    xytext=(0, 3), textcoords="offset points", fontsize=8, color=colours[name],
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(report.sizes[::2], [_size(size) for size in report.sizes[::2]])
        axes.set_xlabel("message")
        axes.set_ylabel(UNITS[kind])
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False)
    panels["latency"].set_yscale("log")
    panels["latency"].set_title("one-way latency")
    panels["bandwidth"].set_ylim(bottom=0)
    panels["bandwidth"].set_title("bandwidth, one direction")
    figure.suptitle(f"VMMC stream sockets as of 1997, emulated (profile {PROFILE})")
    written = [prefix.with_name(f"{prefix.name}.{kind}") for kind in ("png", "svg")]
    for path in written:
        figure.savefig(path, dpi=150)
    return written


def _size(size: int) -> str:
    for unit, scale in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size // scale} {unit}"
    return f"{size} B"
