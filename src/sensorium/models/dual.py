"""CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023): a text tower and a vision tower into one space of vectors.

A prompt is a text or an image. An image's prompt is one token whose row is the finished vector, so that both kinds go
through the same steps: of a row's numbers the last says which of the two it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.text_config import text_part
from sensorium.checkpoint.tokens import special_token, special_tokens
from sensorium.checkpoint.values import count, positive_int
from sensorium.errors import CheckpointError
from sensorium.kernels.context import AttentionContext, KVCache
from sensorium.models.base import Model, Rename, Steps, finished
from sensorium.models.layers import Embedding, Linear, QKVLinear, declare
from sensorium.models.towers.blocks import LayerNorm, Mlp, normalised, separate
from sensorium.models.towers.clip import ClipConfig, ClipEncoder, ClipTower, clip_map
from sensorium.models.towers.siglip import Grid, SiglipTower, area, encoded_slices, grids_of, naflex_config
from sensorium.pooling.pooler import EmbedPooler
from sensorium.types import Modality, PoolingParams

CLIP_TEXT: Mapping[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
"""What CLIP's `text_config` means where it says nothing; the rest is as in vision towers."""
TEXT_KEYS = ("num_hidden_layers", "hidden_act", "layer_norm_eps", *CLIP_TEXT)


class TextTower(nn.Module):
    """CLIP's layers over token embeddings."""

    def __init__(self, config: ClipConfig, vocab_size: int, positions: int) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = Embedding(vocab_size, config.hidden_size)
        self.position_embedding = Embedding(positions, config.hidden_size)
        self.encoder = ClipEncoder(config, config.num_layers)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.eps)

    def forward(self, rows: Tensor, positions: Tensor, lengths: list[int]) -> Tensor:
        """Embeddings [tokens, hidden] of runs -> their states"""
        x: Tensor = rows + self.position_embedding(positions)
        for layer in self.encoder.layers:
            x = finished(layer(x, lengths))
        out: Tensor = self.final_layer_norm(x)
        return out


class DualModel(Model):
    """What both families share. `size` is the vectors'."""

    modalities: ClassVar[frozenset[Modality]] = frozenset({"image"})
    quantizable: ClassVar[tuple[str, ...]] = ("text_model.",)
    weight_map: ClassVar[tuple[Rename, ...]] = (
        *clip_map("text_model"),
        *clip_map("vision_model"),
        Rename("text_model.embeddings.{a}.{p}", "text_model.{a}.{p}"),
    )
    ignored: tuple[str, ...] = ("position_ids", "logit_scale", "logit_bias")
    size: int
    vision_model: Any  # a tower, by what `_tower` makes

    def __init__(self, checkpoint: Checkpoint, text: ClipConfig, positions: int) -> None:
        super().__init__(checkpoint)
        if checkpoint.pooling != "auto":
            raise CheckpointError("--pooling: CLIP and SigLIP have a pooling of their own")
        self.text_model = TextTower(text, checkpoint.vocab_size, positions)
        self.vision_model = self._tower(checkpoint.config.get("vision_config") or {})

    def _tower(self, vision: Mapping[str, Any]) -> nn.Module:
        return ClipTower(ClipConfig.of(vision), [-1], keeps_class_token=True, ends_with_norm=True)

    def _gives(self, pooler: EmbedPooler) -> None:
        self.size = pooler.size
        self.row_size = max(self.size, self.text_model.config.hidden_size) + 1
        self.poolers = {"embed": pooler}

    def embed(self, token_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        """[tokens] -> [tokens, row size]: words, and zeros behind them"""
        return self._wide(self.text_model.token_embedding(token_ids))

    def _wide(self, rows: Tensor, last: float = 0.0) -> Tensor:
        wide = rows.new_zeros(len(rows), self.row_size)
        wide[:, : rows.shape[1]] = rows
        wide[:, -1] = last
        return wide

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        """Finished vectors, one row per image."""
        vectors = []
        pixels = torch.stack([item["pixels"] for item in items])
        for batch in torch.split(pixels, self.vision_model.group_size):
            states = yield from self.vision_model.steps(batch)
            vectors.append(self._image_vectors(states))
        return separate(self._wide(torch.cat(vectors), last=1.0), [1] * len(items))

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache, context: AttentionContext) -> Tensor:
        """Rows [tokens, row size] -> vectors [tokens, size]; of a text's tokens only those count that are pooled."""
        out = hidden[:, : self.size].clone()
        firsts = context.query_start[:-1].long()
        is_text = (hidden[firsts, -1] == 0).tolist()
        lengths = [length for length, text in zip(context.query_lens, is_text, strict=True) if text]
        if lengths:
            of_text = hidden[:, -1] == 0
            rows = hidden[of_text, : self.text_model.config.hidden_size]
            out[of_text] = self._text_vectors(rows, positions[of_text], lengths)
        return out

    def _image_vectors(self, states: Tensor) -> Tensor:
        """[images, rows, hidden] -> [images, size]"""
        raise NotImplementedError

    def _text_vectors(self, rows: Tensor, positions: Tensor, lengths: list[int]) -> Tensor:
        """Embeddings [tokens, hidden] -> [tokens, size]"""
        raise NotImplementedError

    def activation_bytes(self, tokens: int) -> int:
        config, size = self.text_model.config, self.text_model.final_layer_norm.weight.element_size()
        text = tokens * size * (9 * config.hidden_size + 3 * config.intermediate_size + 2 * self.row_size)
        tower: int = self.vision_model.activation_bytes(size)
        return max(text, tower)


class ClipPooler(EmbedPooler):
    """The state of the token that ends the text."""

    def __init__(self, size: int, end_id: int) -> None:
        super().__init__(("last",), size, normalize=True)
        self.all_tokens = True
        self.end_id = end_id

    def __call__(self, hidden: Tensor, params: PoolingParams, token_ids: NDArray[np.int32]) -> Tensor:
        """The first one; without one the first token, as in transformers. Old configs say 2, which is no such token:
        the highest id is meant."""
        ends = token_ids if self.end_id == 2 else token_ids == self.end_id
        place = int(np.argmax(ends))
        return super().__call__(hidden[place : place + 1], params, token_ids)


class ClipModel(DualModel):
    def __init__(self, checkpoint: Checkpoint) -> None:
        text = text_part(checkpoint.config)
        config = replace(_text_config(text, "clip_vision_model", CLIP_TEXT), is_causal=True)
        super().__init__(checkpoint, config, positive_int(text, "max_position_embeddings", 77))
        size = positive_int(checkpoint.config, "projection_dim", 512)
        self.text_projection = Linear(config.hidden_size, size)
        self.visual_projection = Linear(self.vision_model.config.hidden_size, size)
        self._gives(ClipPooler(size, count(text, "eos_token_id", 49407)))

    def _image_vectors(self, states: Tensor) -> Tensor:
        out: Tensor = self.visual_projection(states[:, 0].contiguous())
        return out

    def _text_vectors(self, rows: Tensor, positions: Tensor, lengths: list[int]) -> Tensor:
        out: Tensor = self.text_projection(self.text_model(rows, positions, lengths))
        return out


class AttentionPool(nn.Module):
    """A learnt query looks at all rows of an image; an MLP behind it."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        size, heads = config.hidden_size, config.num_heads
        self.probe = declare(1, 1, size)
        self.in_proj = QKVLinear(size, heads, heads, size // heads, bias=True)
        self.out_proj = Linear(size, size, bias=True)
        self.layernorm = LayerNorm(size, config.eps)
        self.mlp = Mlp(size, config.intermediate_size, config.hidden_act)
        self.head_dim = size // heads

    def forward(self, rows: Tensor, lengths: list[int]) -> Tensor:
        """Rows [rows, hidden] of images that have so many -> [images, hidden]"""
        images, size = len(lengths), rows.shape[1]
        projected = self.in_proj(torch.cat([self.probe[0].to(rows.dtype), rows]))
        q, k, v = projected.view(len(projected), 3, -1, self.head_dim).unbind(1)
        queries = q[:1].expand(images, -1, -1).contiguous()
        seen = kernels.first_attention(queries, k[1:], v[1:], lengths, self.head_dim**-0.5)
        x = self.out_proj(seen.reshape(images, size))
        out: Tensor = x + self.mlp(self.layernorm(x))
        return out


class SiglipModel(DualModel):
    """Texts are padded to the length that the tower was trained with, and the padding is looked at."""

    weight_map: ClassVar[tuple[Rename, ...]] = (
        *DualModel.weight_map,
        Rename("text_model.head.{p}", "text_head.{p}"),
        Rename("vision_model.head.probe", "head.probe"),
        Rename("vision_model.head.attention.in_proj_weight", "head.in_proj.weight"),
        Rename("vision_model.head.attention.in_proj_bias", "head.in_proj.bias"),
        Rename("vision_model.head.attention.out_proj.{p}", "head.out_proj.{p}"),
        Rename("vision_model.head.layernorm.{p}", "head.layernorm.{p}"),
        Rename("vision_model.head.mlp.{a}.{p}", "head.mlp.{a}.{p}"),
    )

    def __init__(self, checkpoint: Checkpoint) -> None:
        text = text_part(checkpoint.config)
        if not (checkpoint.config.get("vision_config") or {}).get("vision_use_head", True):
            raise CheckpointError("config.json: SigLIP without its head (vision_use_head) makes no vectors of images")
        config = _text_config(text, "siglip_vision_model", {})
        self.length = positive_int(text, "max_position_embeddings", 64)
        super().__init__(checkpoint, config, self.length)
        size = positive_int(text, "projection_size", config.hidden_size)
        self.text_head = Linear(config.hidden_size, size, bias=True)
        self.head = AttentionPool(self.vision_model.config)
        if size != self.vision_model.config.hidden_size:
            raise CheckpointError(
                f"config.json: texts' vectors have {size} numbers (projection_size), images' "
                f"{self.vision_model.config.hidden_size}"
            )
        self.padding, self.pads_left = _padding(checkpoint)
        self._gives(EmbedPooler(("last",), size, normalize=True))

    def _image_vectors(self, states: Tensor) -> Tensor:
        out: Tensor = self.head(states.flatten(0, 1), [states.shape[1]] * len(states))
        return out

    def _text_vectors(self, rows: Tensor, positions: Tensor, lengths: list[int]) -> Tensor:
        """The last token's vector for all of a text."""
        device = rows.device
        padding = self.text_model.token_embedding(torch.tensor([self.padding], device=device))
        padded = padding.expand(len(lengths) * self.length, -1).clone()
        for index, run in enumerate(torch.split(rows, lengths)):
            start = index * self.length + (self.length - len(run) if self.pads_left else 0)
            padded[start : start + len(run)] = run
        places = torch.arange(self.length, device=device).repeat(len(lengths))
        states = self.text_model(padded, places, [self.length] * len(lengths))
        vectors = self.text_head(states[self.length - 1 :: self.length])
        return torch.repeat_interleave(vectors, torch.tensor(lengths, device=device), dim=0)


class NaflexModel(SiglipModel):
    """SigLIP 2 whose images keep their aspect: `pixels` of an image are its patches."""

    def _tower(self, vision: Mapping[str, Any]) -> nn.Module:
        config = naflex_config(vision)
        return SiglipTower(config, config.num_layers, is_naflex=True)

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        dtype = self.text_model.final_layer_norm.weight.dtype
        patches = [normalised(item, dtype) for item in items]
        return (yield from encoded_slices(patches, [*map(grids_of, items)], self._encode, lambda _: 1, area))

    def _encode(self, patches: Tensor, grids: Sequence[Grid]) -> Steps[Tensor]:
        states = yield from self.vision_model.steps(patches, grids)
        return self._wide(self.head(states, [lines * columns for lines, columns in grids]), last=1.0)


def _text_config(text: Mapping[str, Any], tower: str, defaults: Mapping[str, Any]) -> ClipConfig:
    """`tower` is the `model_type` of a vision tower whose defaults count."""
    stated = {name: text[name] for name in TEXT_KEYS if text.get(name) is not None}
    return ClipConfig.of({"model_type": tower, **defaults, **stated})


def _padding(checkpoint: Checkpoint) -> tuple[int, bool]:
    """(id of the tokenizer's padding, whether it stands before the text). Its own files say it: config.json has the
    number of the first SigLIP in every later one too."""
    files = checkpoint.tokenizer_config
    token = special_token(files, "pad")
    ids = [i for i, text in special_tokens(checkpoint.folder, files) if text == token]
    stated = count(text_part(checkpoint.config), "pad_token_id", 1)
    return (ids[0] if ids else stated), files.get("padding_side") == "left"
