"""A step's input as the message that followers get of it, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensorium.engine.batch import StepInput
from sensorium.ipc.ranks import Arrays, StepPlan, decode_step, encode_step
from sensorium.kernels.context import AttentionContext, LayerRows, Segments
from sensorium.parallel.ranks import Ranks

_MARKS = "long_context"  # the only array of booleans, which have no place on the wire


class FollowedStep(NamedTuple):
    """A step as a follower computes it."""

    inputs: StepInput  # without media
    num_media_tokens: int
    adapters: dict[int, Tensor | None]  # tokens of each, by its number; None: all


def frame_of(step: StepInput) -> bytes:
    """Of a step whose tensors are on the CPU."""
    context = step.context
    if context.memories or context.aligned:
        raise ValueError("the step has what ranks do not share")
    tensors = {"token_ids": step.token_ids, "positions": step.positions, "token_types": step.token_types}
    tensors |= {"query_start": context.query_start, "seq_lens": context.seq_lens}
    for number in range(1 + len(context.others)):
        own = context.by_table(number)
        tensors |= {f"block_tables.{number}": own.block_tables, f"slots.{number}": own.slots}
    tensors |= {_MARKS: context.long_context, "rope_lengths": context.rope_lengths, "visible": context.visible}
    segments = context.segments
    if segments is not None:
        tensors |= {"sources": segments.sources, "targets": segments.targets}
    adapters = {} if context.adapters is None else context.adapters.rows()
    tensors |= {f"adapter.{number}": rows for number, rows in adapters.items()}
    plan = StepPlan(
        context.query_lens,
        context.context_lens,
        context.num_decodes,
        context.block_size,
        context.needed_states,
        context.unseen,
        None if segments is None else (segments.lengths, segments.num_singles),
        1 + len(context.others),
        sum(one.end - one.start for one in step.media),
        tuple(adapters),
    )
    return encode_step(plan, {name: _array(one) for name, one in tensors.items() if one is not None})


def _array(tensor: Tensor) -> NDArray[Any]:
    return (tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).numpy()


def step_of(payload: memoryview) -> FollowedStep:
    """What `frame_of` was given, on the CPU."""
    plan, arrays = decode_step(payload)
    tensors = _tensors(arrays)
    context = AttentionContext(
        plan.query_lens,
        plan.context_lens,
        plan.num_decodes,
        plan.block_size,
        tensors["query_start"],
        tensors["seq_lens"],
        tensors["block_tables.0"],
        tensors["slots.0"],
        tensors[_MARKS].bool() if _MARKS in tensors else None,
        tensors.get("rope_lengths"),
        visible=tensors.get("visible"),
        unseen=plan.unseen,
        segments=None if plan.segments is None else Segments(*plan.segments, tensors["sources"], tensors["targets"]),
        needed_states=plan.needed_states,
    )
    for number in range(1, plan.num_tables):
        blocks, slots = tensors[f"block_tables.{number}"], tensors[f"slots.{number}"]
        context.others.append(replace(context, block_tables=blocks, slots=slots, others=[]))
    step = StepInput(tensors["token_ids"], tensors["positions"], context, token_types=tensors.get("token_types"))
    adapters = {number: tensors.get(f"adapter.{number}") for number in plan.adapters}
    return FollowedStep(step, plan.num_media_tokens, adapters)


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(one)) for name, one in arrays.items()}


def moved(step: StepInput, device: torch.device) -> StepInput:
    """The same with its tensors on a device."""
    if device.type == "cpu":
        return step

    def on(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    def context_on(one: AttentionContext) -> AttentionContext:
        found = {name: on(getattr(one, name)) for name in ("query_start", "seq_lens", "block_tables", "slots")}
        found |= {name: on(getattr(one, name)) for name in ("long_context", "rope_lengths", "token_ids", "visible")}
        segments = one.segments
        if segments is not None:
            segments = replace(segments, sources=segments.sources.to(device), targets=segments.targets.to(device))
        others = [context_on(other) for other in one.others]
        adapters = None if one.adapters is None else one.adapters.moved(device)
        return replace(one, **found, segments=segments, others=others, adapters=adapters)  # type: ignore[arg-type]

    names = ("token_ids", "positions", "sampled_rows", "token_types")
    tensors = {name: on(getattr(step, name)) for name in names}
    return replace(step, **tensors, context=context_on(step.context))  # type: ignore[arg-type]


def share_media(
    ranks: Ranks, hidden: Tensor, deepstack: int, num_tokens: int, rows: LayerRows | None = None
) -> tuple[Tensor, LayerRows | None]:
    """Rank 0's embeddings [tokens, hidden], in which media have their place, and what they add to later layers, for all
    ranks. `rows` are rank 0's."""
    hidden = ranks.from_first(hidden)
    if not deepstack:
        return hidden, None
    if rows is None:
        tokens = torch.empty(num_tokens, dtype=torch.int64, device=hidden.device)
        rows = LayerRows(tokens, hidden.new_empty(num_tokens, deepstack, hidden.shape[1]))
    return hidden, LayerRows(ranks.from_first(rows.tokens), ranks.from_first(rows.values))
