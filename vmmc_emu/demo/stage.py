"""How demos speak: headings, tables, bars, and claims that are checked."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

BAR_WIDTH = 40


class DemoFailed(Exception):
    """Something did not happen that the demo says happens."""


class Stage:
    """Where a demo prints.  In colour on a terminal, unless NO_COLOR is set."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        if isinstance(self.out, io.TextIOWrapper):
            self.out.reconfigure(errors="replace")  # a terminal that cannot show a mark shows "?"
        self.colour = self.out.isatty() and not os.environ.get("NO_COLOR")
        self.began = time.monotonic()

    def _styled(self, text: str, style: str) -> str:
        return f"\033[{style}m{text}\033[0m" if self.colour else text

    def heading(self, text: str) -> None:
        """A new part."""
        self.say()
        self.say(self._styled(text, "1"))

    def say(self, text: str = "") -> None:
        """One line, at once."""
        print(text, file=self.out, flush=True)

    def command(self, node: int, command: Sequence[str]) -> None:
        """Shows a command as a user would type it."""
        self.say(self._styled(f"  $ vmmc-emu run --node {node} -- {' '.join(command)}", "36"))

    def quote(self, text: str) -> None:
        """Shows what a program said."""
        for line in text.rstrip("\n").splitlines():
            self.say(self._styled("  │ ", "2") + line)

    def claim(self, holds: bool, text: str, otherwise: str = "") -> None:
        """Says that something happened, having looked; raises `DemoFailed` when it did not."""
        if not holds:
            raise DemoFailed(
                f"this should hold and does not: {text}" + (f" ({otherwise})" if otherwise else "")
            )
        self.say(self._styled("  ✓ ", "32") + text)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """The first column to the left, all others to the right."""
        cells = [list(header), *([str(cell) for cell in row] for row in rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
        for number, row in enumerate(cells):
            line = "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            self.say("  " + (self._styled(line, "2") if number == 0 else line))

    def bars(self, unit: str, values: Sequence[tuple[str, float]]) -> None:
        """A bar chart."""
        most = max(value for _, value in values)
        label_width = max(len(label) for label, _ in values)
        for label, value in values:
            eighths = round(value / most * BAR_WIDTH * 8) if most else 0
            bar = "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
            self.say(f"  {label:<{label_width}}  {self._styled(bar, '36')} {value:.2f} {unit}")

    def end(self) -> None:
        """The last line."""
        self.say()
        self.say(f"All of this happened, in {time.monotonic() - self.began:.1f} s.")


def bytes_said(count: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
