"""What the commands share: tables, units, and errors that are one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import click

P = ParamSpec("P")
T = TypeVar("T")


def explained(function: Callable[P, T]) -> Callable[P, T]:
    """Errors that a person can do something about become one line on standard error, and status 1."""

    @wraps(function)
    def wrapper(*arguments: P.args, **keywords: P.kwargs) -> T:
        try:
            return function(*arguments, **keywords)
        except BrokenPipeError:
            # Whoever reads our output has had enough (| head): nothing to complain about.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(141)
        except OSError as error:
            if error.filename is not None:
                raise click.ClickException(f"{error.filename}: {error.strerror}") from None
            raise click.ClickException(str(error.strerror or error)) from None

    return wrapper


def table(head: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[int] = ()) -> Iterator[str]:
    """Columns as wide as they need to be; the last as it comes."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(head), *cells]) for i in range(len(head))]
    numbers = set(right)

    def line(row: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    yield click.style(line(list(head)), bold=True)
    yield from map(line, cells)


def show_lines(lines: Iterable[str]) -> None:
    """Prints lines as they come."""
    for line in lines:
        click.echo(line)


def show_json(data: object) -> None:
    """Prints JSON for programs."""
    click.echo(json.dumps(data, indent=2))


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.0f} s"


def byte_count(count: int) -> str:
    """A number of bytes with three digits and a unit."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
