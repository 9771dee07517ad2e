"""Whether a request can run at all, asked once before anything is allocated. A reason is text that a client may read.

After this the step loop relies on what is checked here: nothing in a request can make a step fail for its mates.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sensorium.types import EngineRequest, Prompt


def refusal(
    request: EngineRequest,
    *,
    max_model_len: int,
    axes: int,
    generates: bool,
    pooling: Mapping[str, bool],
    attends_to_media: bool = False,
) -> str:
    """Why the request can never run, or "". `pooling` has the model's pooling tasks, `axes` its position axes;
    `attends_to_media`: see `models.cache`."""
    length = len(request.prompt.token_ids)
    if not length:
        return "The prompt is empty."
    if (request.sampling is None) == (request.pooling is None):
        return "A request either generates or pools."
    if request.sampling is not None and not generates:
        return "This model does not generate text."
    for task in () if request.pooling is None else request.pooling.tasks:
        if task not in pooling:
            return f"This model does not do the task '{task}'."
    if request.sampling is not None and length + request.sampling.max_tokens > max_model_len:
        return (
            f"The prompt has {length} tokens and max_tokens is {request.sampling.max_tokens}; "
            f"together they may be at most {max_model_len}."
        )
    if length > max_model_len:
        return f"The prompt has {length} tokens; at most {max_model_len} fit."
    if request.sampling is not None and request.sampling.max_tokens < 1:
        return "max_tokens must be at least 1."
    beside = len(request.prompt.media) - len({span.item for span in request.prompt.spans})
    if beside != attends_to_media:
        return "This model needs one recording." if attends_to_media else "The prompt has no place for its media."
    return "" if _is_consistent(request.prompt, axes) else "The prompt's media and tokens do not belong together."


def _is_consistent(prompt: Prompt, axes: int) -> bool:
    """Every span lies in the prompt, after the one before it, and takes rows that its item has."""
    length = len(prompt.token_ids)
    end = 0
    for span in prompt.spans:
        if span.offset < end or span.length < 1 or not 0 <= span.item < len(prompt.media):
            return False
        if span.row < 0 or span.row + span.length > prompt.media[span.item].num_rows:
            return False
        end = span.offset + span.length
    positions = prompt.positions
    if positions is not None and positions.shape != (axes, length):
        return False
    return end <= length and prompt.token_ids.ndim == 1 and bool(np.all(prompt.token_ids >= 0))
