"""Over how many ranks a model can be split: its heads and its inner states are shared out, a part for each."""

from __future__ import annotations

from collections.abc import Iterator

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.text_config import TextConfig
from sensorium.errors import StartupError

FLAG = "--tensor-parallel-size"
MOST = 64


def check_ranks(checkpoint: Checkpoint, size: int) -> None:
    """StartupError says in one line why so many ranks cannot share the model, and how many can."""
    if size == 1:
        return
    text = _split_text(checkpoint)
    if text is None:
        raise StartupError(
            f"{FLAG} {size}: {checkpoint.family.title} is not split over devices; start a server for each"
        )
    obstacle = next(_obstacles(text, size), None)
    if obstacle is not None:
        fitting = ", ".join(map(str, sizes(checkpoint)))
        raise StartupError(f"{FLAG} {size}: {obstacle} cannot be shared out (sizes that work: {fitting})")


def sizes(checkpoint: Checkpoint) -> list[int]:
    """All that work, up to `MOST`."""
    text = _split_text(checkpoint)
    if text is None:
        return [1]
    return [size for size in range(1, MOST + 1) if next(_obstacles(text, size), None) is None]


def _split_text(checkpoint: Checkpoint) -> TextConfig | None:
    family = checkpoint.family
    return checkpoint.text if family.is_split and family.encoder is None else None


def _obstacles(text: TextConfig, size: int) -> Iterator[str]:
    """What does not go into so many parts."""
    attending = [spec for spec in text.layers if spec.state is None]
    if attending and not text.norms_whole_qk:
        if text.num_heads % size:
            yield f"{text.num_heads} query heads"
        for kv_heads in sorted({spec.num_kv_heads or text.num_kv_heads for spec in attending}):
            if kv_heads % size and size % kv_heads:
                yield f"{kv_heads} key heads"
    routed = set() if text.routing is None else set(text.routing.layers)
    inner = {spec.intermediate_size or text.intermediate_size for i, spec in enumerate(text.layers) if i not in routed}
    if text.routing is not None:
        if text.routing.num_experts < size:
            yield f"{text.routing.num_experts} experts"
        inner |= {text.routing.shared_size} - {0}
    for width in sorted(inner):
        if width % size:
            yield f"{width} inner states"
    if text.hidden_size % size:
        yield f"{text.hidden_size} hidden states"
