"""Decode steps as graphs: what they launch is recorded once for some numbers of sequences and replayed as a whole.

A graph reads what a step puts into `Staging` and writes logits into a tensor that all graphs share. Steps of fewer
sequences are padded: rows of no length, whose keys, values and states go where nobody reads. What cannot be captured
(prompts, drafts, adapters, encoders' rows) is computed as it was.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sensorium.engine.batch import StepInput

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)

logger = logging.getLogger(__name__)


class Capture(Protocol):
    """Records what a function launches."""

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        """What launches the same again, over the same memory."""
        ...


@dataclass(frozen=True, slots=True)
class Graph:
    """A decode step of `size` sequences. `inputs` are the places that it reads."""

    size: int
    inputs: StepInput
    replay: Callable[[], None]

    def reads(self, inputs: StepInput) -> bool:
        """Whether the tensors of a step are where the graph expects them."""
        return all(map(_same_place, _tensors(self.inputs), _tensors(inputs)))


class Graphs:
    """The graphs of an engine, and what they write."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device, capture: Capture) -> None:
        self.sizes = graph_sizes(max_num_seqs)
        self.logits = torch.zeros((self.sizes[-1], vocab_size), device=device)  # float32, as the sampler takes them
        self._capture = capture
        self._graphs: dict[int, Graph] = {}
        self._captured: list[int] = []  # ascending
        self._missing = [*self.sizes[1:], *self.sizes[:1]]  # from the end: one sequence, then the largest first

    @property
    def missing(self) -> bool:
        """Whether some are still to be captured."""
        return bool(self._missing)

    def padded(self, count: int) -> int | None:
        """Sequences of the smallest graph that holds so many; None without one."""
        index = bisect_left(self._captured, count)
        return self._captured[index] if index < len(self._captured) else None

    @property
    def is_whole(self) -> bool:
        """Whether all sizes are there."""
        return len(self._graphs) == len(self.sizes)

    def find(self, size: int) -> Graph | None:
        return self._graphs.get(size)

    def add(self, blank: Callable[[int], StepInput], compute: Callable[[StepInput, Tensor], None]) -> None:
        """Capture the next one: `compute` writes the logits of a step to a tensor. None is made where there is no
        memory, and no more of a model that asks for the lengths of sequences."""
        size = self._missing.pop()
        inputs, out = blank(size), self.logits[:size]
        try:
            replay = self._capture(lambda: compute(inputs, out))
        except torch.OutOfMemoryError as error:
            logger.warning("no memory for graphs of decodes of %d sequences: %s", size, error)
            self._missing = [one for one in self._missing if one < size]
            return
        except ValueError as error:
            logger.warning("decodes are not captured as graphs: %s", error)
            self._missing = []
            return
        self._graphs[size] = Graph(size, inputs, replay)
        self._captured = sorted(self._graphs)

    def drop(self) -> None:
        """Forget all: what they launch has changed."""
        self._graphs.clear()
        self._captured = []
        self._missing = [*self.sizes[1:], *self.sizes[:1]]  # as at the start


class CudaCapture:
    """Torch's graphs. All share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        side = torch.Stream("cuda")
        side.wait_stream(torch.cuda.current_stream())
        with side:
            compute()  # once without: libraries allocate at their first call, which cannot be captured
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            compute()
        return graph.replay


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Of the graphs of an engine: up to the first that holds as many sequences as ever decode."""
    return SIZES[: bisect_left(SIZES, max_num_seqs) + 1]


def _same_place(one: Tensor | None, other: Tensor | None) -> bool:
    """Of views of one buffer."""
    if one is None or other is None or one is other:
        return one is other
    return one.storage_offset() == other.storage_offset() and one.shape == other.shape and one.dtype == other.dtype


def _tensors(inputs: StepInput) -> list[Tensor | None]:
    context = inputs.context
    found = [inputs.token_ids, inputs.positions, inputs.table_rows, context.query_start, context.seq_lens]
    found += [context.slots, context.long_context, context.rope_lengths]
    if context.segments is not None:
        found += [context.segments.sources, context.segments.targets]
    return found + [other.slots for other in context.others]
