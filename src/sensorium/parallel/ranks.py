"""The processes that share one model: who has which part of it, and the sums and joins of what they compute.

The tensors go through torch.distributed, NCCL between GPUs and gloo between processors, which have sockets of their own
(`lines`) for what is small; all ranks are on one machine.
Who is dead or hangs is seen on the sockets (`engine.leader`), long before a collective gives up.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from sensorium.parallel.lines import MOST_BYTES, Lines, fits

GIVE_UP = timedelta(hours=1)


class Span(NamedTuple):
    """Rows [first, first + rows) of a stored weight, which a rank has from row `here` of its own on."""

    here: int
    first: int
    rows: int


class Ranks:
    """One rank's view of the group. Collectives work once it is connected; all ranks must call the same ones."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.waits = False  # in a collective, for the others
        self._group: Any = None  # of torch.distributed, whose stubs know no collectives of NCCL and gloo
        self._lines: Lines | None = None  # between processors, where they could meet

    def connect(self, store: Path, device: torch.device) -> None:
        """Meet the others, who have the same file, which must not be there before the first of them."""
        meeting = distributed.FileStore(  # type: ignore[attr-defined]  # the stubs forget it
            str(store), self.size
        )
        lines = None if device.type == "cuda" or not fits(store) else Lines(self.rank, self.size, store)
        kind: Any = distributed.ProcessGroupNCCL if device.type == "cuda" else distributed.ProcessGroupGloo
        options = kind.Options() if device.type == "cuda" else kind._Options()
        options._timeout = GIVE_UP
        if device.type != "cuda":
            options._devices = [kind.create_device(hostname="127.0.0.1")]  # nobody else's network hears of it
        self._group = kind(meeting, self.rank, self.size, options)
        if lines is not None:
            lines.meet()
        self._lines = lines

    def part(self, total: int) -> tuple[int, int]:
        """(first, count) of `total` things that are shared out; the last ranks have fewer where they do not divide."""
        each = -(-total // self.size)
        first = min(self.rank * each, total)
        return first, min(each, total - first)

    def fair_part(self, total: int) -> tuple[int, int]:
        """The same with none at all only where there are fewer things than ranks."""
        first = self.rank * total // self.size
        return first, (self.rank + 1) * total // self.size - first

    def part_or_copy(self, total: int) -> tuple[int, int]:
        """The same of things of which several ranks have a copy each where there are fewer than ranks."""
        return self.part(total) if total >= self.size else (self.rank * total // self.size, 1)

    def sum(self, x: Tensor) -> Tensor:
        """Of all ranks' tensors, maybe in place; the same bits on all ranks."""
        x = x.contiguous()
        lines = self._lines_for(x)
        if lines is None:
            self._wait(self._connected.allreduce([x]))
            return x
        first, *rest = self._over(lines, x)
        for part in rest:
            first += part
        return first

    def join(self, x: Tensor) -> Tensor:
        """[.., n] of each rank -> [.., size * n] in their order."""
        x = x.contiguous()
        lines = self._lines_for(x)
        if lines is not None:
            return torch.cat(self._over(lines, x), -1)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._wait(self._connected.allgather([parts], [x]))
        return torch.cat(parts, -1)

    def join_on_first(self, x: Tensor) -> Tensor:
        """The same on rank 0 alone; what others get means nothing."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        options = distributed.GatherOptions()
        options.rootRank = 0
        self._wait(self._connected.gather([parts] if parts else [], [x], options))
        return torch.cat(parts, -1) if parts else x

    def from_first(self, x: Tensor) -> Tensor:
        """Rank 0's tensor; those of the others, of the same shape, are written over."""
        x = x.contiguous()
        self._wait(self._connected.broadcast([x], distributed.BroadcastOptions()))
        return x

    def _lines_for(self, x: Tensor) -> Lines | None:
        """What is small goes over sockets, where there are some."""
        return self._lines if x.dim() > 0 and 0 < x.nbytes <= MOST_BYTES else None

    def _over(self, lines: Lines, x: Tensor) -> list[Tensor]:
        """What each rank has, in their order."""
        parts = [x if rank == self.rank else torch.empty_like(x) for rank in range(self.size)]
        views = [part.view(torch.uint8).numpy().data.cast("B") for part in parts]
        self.waits = True
        lines.exchange(views[self.rank], {rank: view for rank, view in enumerate(views) if rank != self.rank})
        self.waits = False
        return parts

    @property
    def _connected(self) -> Any:
        if self._group is None:
            raise RuntimeError("the ranks have not met yet")
        return self._group

    def _wait(self, work: Any) -> None:
        self.waits = True
        work.wait()
        self.waits = False
