"""How far many requests are: a bar on a terminal, elsewhere now and then a line, where somebody reads them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

SAY_EVERY_S = 10.0


class Count(Protocol):
    def __call__(self, *, tokens: int, failed: bool) -> None:
        """One more is done."""


@contextmanager
def counting(total: int, *, done: int = 0, say: Callable[[str], None] | None = None) -> Iterator[Count]:
    """`done` were done before. `say` is given lines where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    start_s = said_s = time.perf_counter()
    failed_count = token_count = 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
        console=console,
        refresh_per_second=4,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("requests", total=total, completed=done, speed="")

        def count(*, tokens: int, failed: bool) -> None:
            nonlocal done, failed_count, token_count, said_s
            done, failed_count, token_count = done + 1, failed_count + failed, token_count + tokens
            now = time.perf_counter()
            speed = f"{token_count / (now - start_s):.1f} tok/s" + (f", {failed_count} failed" if failed_count else "")
            bar.update(task, advance=1, speed=speed)
            if say is not None and not console.is_terminal and now - said_s >= SAY_EVERY_S:
                said_s = now
                say(f"{done} of {total} requests, {speed}")

        yield count
