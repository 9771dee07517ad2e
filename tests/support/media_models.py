"""A tiny model with media as the tests run it: transformers' own beside ours, prompts, rows in their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import load_class
from sensorium.models.base import Model
from sensorium.models.loading import load_model
from sensorium.processors.base import Processor
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, Modality, Prompt
from support.image_families import noise
from support.model_driver import Sequence as Running
from support.speech import recording


@dataclass
class Served:
    oracle: PreTrainedModel
    model: Model
    processor: Processor
    preprocessor: dict[str, Any]

    def encode(self, media: Sequence[MediaFeatures]) -> list[torch.Tensor]:
        """Rows of each, the media of one kind in one batch, as the engine does it."""
        rows: dict[int, torch.Tensor] = {}
        for kind in dict.fromkeys(one.kind for one in media):
            places = [i for i, one in enumerate(media) if one.kind == kind]
            items = [{name: torch.from_numpy(array) for name, array in media[i].arrays.items()} for i in places]
            with torch.inference_mode():
                rows.update(zip(places, self.model.encode(kind, items), strict=True))
        return [rows[i] for i in range(len(media))]

    def prompt(self, items: Sequence[MediaItem], text: str = "USER: look, {} what is shown?") -> Prompt:
        return prompt_of(self.processor, items, text)

    def run(self, prompt: Prompt) -> Running:
        """The prompt's embeddings with the media's rows in their places, as the engine does it."""
        ids = torch.from_numpy(prompt.token_ids).long()
        rows = self.model.embed(ids).clone()
        encoded = self.encode(prompt.media) if prompt.media else []
        size = rows.shape[1]
        deep = rows.new_zeros(len(ids), self.model.deepstack * size)
        for span in prompt.spans:
            found = encoded[span.item][span.row : span.row + span.length]
            rows[span.offset : span.offset + span.length] = found[:, :size]
            if found.shape[1] > size:  # audio has rows for the first layer only
                deep[span.offset : span.offset + span.length] = found[:, size:]
        positions = None if prompt.positions is None else torch.from_numpy(prompt.positions)
        text = self.model.checkpoint.text
        if positions is None and text is not None and text.rope.mrope_section:  # a batch has as many axes everywhere
            positions = torch.arange(len(ids)).expand(3, -1)
        return Running(
            ids.tolist(),
            rows=rows,
            layer_rows=deep.unflatten(1, (-1, size)) if prompt.spans and self.model.deepstack else None,
            positions=positions,
            position_delta=prompt.position_delta,
            spans=tuple(span for span in prompt.spans if prompt.media[span.item].kind != "audio"),
        )


def prompt_of(processor: Processor, items: Sequence[MediaItem], text: str) -> Prompt:
    """`{}` in the text is where the media stand."""
    marks, seen = [], list[Modality]()
    for item in items:
        marks.append(processor.placeholder(item.kind, seen.count(item.kind)))
        seen.append(item.kind)
    processor = processor.with_overrides(processor.implied(seen))
    return processor.build(text.format(" and ".join(marks)), [processor.process(item) for item in items])


def two_of(kind: Modality) -> list[MediaItem]:
    """Of different sizes; one video."""
    if kind == "audio":
        return [recording(9_000, 1), recording(17_001, 2)]
    sizes = [(50, 70), (90, 31)] if kind == "image" else [(40, 60)]
    found = [noise(*size, frames=None if kind == "image" else 3, seed=i) for i, size in enumerate(sizes)]
    if kind == "video":
        found = [replace(one, timestamps_s=(0.0, 0.5, 1.0), duration_s=1.5) for one in found]
    return found


def again(run: Running) -> Running:
    """The same prompt, nothing of which is computed yet; its media are not encoded anew."""
    return replace(run, tokens=list(run.tokens), blocks=[], cached=0, state=0)


def load(folder: Path, oracle: PreTrainedModel) -> Served:
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    make = load_class(checkpoint.family.processor)
    return Served(oracle, model, make(checkpoint, Tokenizer.from_folder(folder)), checkpoint.preprocessor)
