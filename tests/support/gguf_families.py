"""Tiny checkpoints as llama.cpp's converter writes them.

`gguf_families.json` has, of each, the metadata and the names that llama.cpp's converter (of llama-cpp-python 0.3.36)
wrote for the tiny checkpoint of that name, and of each name the parameter (and the shard of it) that it was read as
when the converter's own file gave the logits of the checkpoint. So no test asks this project's table what is right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import load_class
from sensorium.models.layers import Linear
from sensorium.models.loading import _assign
from sensorium.weights.checkpoint_files import stored_tensors
from support.gguf_writer import container, encoded

FAMILIES: Mapping[str, Any] = json.loads((Path(__file__).parent / "gguf_families.json").read_text())


class Parameters:
    """Of a checkpoint's folder, by name, whatever its files call them."""

    def __init__(self, folder: Path) -> None:
        language = folder / "language"  # a repository of its own
        checkpoint = open_checkpoint(folder, language if language.is_dir() else None)
        with torch.device("meta"):
            self.model = load_class(checkpoint.family.model)(checkpoint)
        slots = _assign(self.model, stored_tensors(checkpoint.weight_files, checkpoint.text_weight_files))
        self.found = {
            name: torch.cat([rows.float() for _, rows in sorted(slot.pieces(), key=lambda piece: piece[0])])
            for name, slot in slots.items()
        }

    def get(self, place: str) -> Tensor:
        """ "name" or "name shard"; with "{}" of every expert, in one tensor."""
        if "{}" in place:
            return torch.stack([self.get(place.replace("{}", str(index))) for index in range(self._experts(place))])
        name, _, shard = place.partition(" ")
        if not shard:
            return self.found[self.model.tied.get(name, name)]
        module = self.model.get_submodule(name.rpartition(".")[0])
        assert isinstance(module, Linear)
        first, rows = module.shards[shard]
        return self.found[name][first : first + rows]

    def _experts(self, place: str) -> int:
        before, after = place.split(" ", maxsplit=1)[0].split("{}")
        return sum(name.startswith(before) and name.endswith(after) for name in self.found)


def write_family(
    folder: Path,
    file: Path,
    family: str,
    tokenizer: Mapping[str, Any],
    kind: str = "F32",
    more: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """The tiny checkpoint `family` in `folder`, its matrices as `kind`, with `more` tensors by their names in GGUF."""
    stated, parameters = FAMILIES[family], Parameters(folder)
    metadata: dict[str, Any] = {**stated["metadata"], **tokenizer}
    places = dict(stated["outer"])
    for layers, names in stated["layers"].items():
        for layer in layers.split(" "):
            prefix = stated.get("layer", "model.layers.{}.").format(layer)
            places |= {f"blk.{layer}.{one}": f"{prefix}{stated['blocks'][one]}" for one in names.split()}
    numbers = {name: torch.tensor(values) for name, values in stated["numbers"].items()}
    tensors = {name: _as_written(name, parameters.get(place), metadata) for name, place in places.items()}
    stored = {}
    for name, tensor in {**numbers, **tensors, **more}.items():
        is_matrix = tensor.dim() > 1 and name.endswith(".weight") and tensor.shape[-1] % 32 == 0
        own = kind if is_matrix and "norm" not in name else "F32"
        stored[name] = (own, tuple(tensor.shape), encoded(tensor, own))
    file.write_bytes(container(metadata, stored))


def write_tower(folder: Path, file: Path, family: str, kind: str = "F32", **more: Any) -> None:
    """The tower of the tiny checkpoint `family` in `folder`, its matrices as `kind`. `more`: of the metadata."""
    tower, parameters = FAMILIES[family]["tower"], Parameters(folder)
    places = dict(tower["outer"])
    for letter, part in (("v", tower), ("a", tower.get("heard", {"layers": 0}))):
        for layer in range(part["layers"]):
            for name, place in part["blocks"].items():
                places[f"{letter}.blk.{layer}.{name}"] = place.replace("{}", str(layer))
    metadata = {**tower["metadata"], **more}
    tensors = {}
    for name, place in places.items():
        whole, _, part = place.partition("@")
        tensor = _as_in_tower(name, parameters.get(whole), metadata)
        if part:  # a frame of a convolution, or a third of what is multiplied at once
            tensor = tensor[:, :, int(part)].contiguous() if tensor.dim() > 2 else tensor.chunk(3)[int(part)]
        own = kind if tensor.dim() == 2 and name.endswith(".weight") and tensor.shape[-1] % 32 == 0 else "F32"
        tensors[name] = (own, tuple(tensor.shape), encoded(tensor, own))
    file.write_bytes(container(metadata, tensors))


def _as_in_tower(name: str, tensor: Tensor, metadata: Mapping[str, Any]) -> Tensor:
    if metadata.get("clip.projector_type") == "pixtral" and name.split(".")[-2] in ("attn_q", "attn_k"):
        heads = metadata["clip.vision.attention.head_count"]
        return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if name == "mm.soft_emb_norm.weight":
        return tensor + 1
    if name == "v.class_embd":
        return tensor.flatten()
    if name == "v.patch_embd.weight" and tensor.dim() == 2:  # a linear layer, as a convolution
        side = math.isqrt(tensor.shape[1] // 3)
        return tensor.view(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()
    if name.startswith("a.conv") and name.endswith(".bias"):
        return tensor.view(-1, *[1] * (1 + ("2d" in name)))
    if name.endswith(("_min", "_max")):
        return tensor.view(1)
    if name.endswith("per_dim_scale.weight"):
        return torch.nn.functional.softplus(tensor)
    if name == "resampler.proj.weight":
        return tensor.t().contiguous()
    if name.endswith("conv_dw.weight"):
        return tensor.squeeze(1)
    return tensor.squeeze(0) if name.startswith("v.position_embd") else tensor


def _as_written(name: str, tensor: Tensor, metadata: Mapping[str, Any]) -> Tensor:
    """What the converter makes of the contents."""
    kind = metadata["general.architecture"]
    heads = metadata[f"{kind}.attention.head_count"]
    kv_heads = metadata.get(f"{kind}.attention.head_count_kv", heads)
    own = name.split(".")[2] if name.startswith("blk.") else name
    if name == "position_embd.weight":  # without RoBERTa's rows before the first position
        return tensor[-metadata[f"{kind}.context_length"] :].contiguous()
    if kind in ("llama", "mistral3") and own in ("attn_q", "attn_k"):
        count = heads if own == "attn_q" else kv_heads
        return tensor.view(count, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if kind == "glm4" and own in ("attn_q", "attn_k"):
        return _halves(tensor, heads if own == "attn_q" else kv_heads, metadata["glm4.rope.dimension_count"])
    if kind.startswith("qwen35"):
        tensor = _delta_net(own, tensor, metadata, kind)
    if (
        (kind == "gemma" or kind.startswith(("gemma3", "gemma-embedding", "qwen35")))
        and name.endswith("norm.weight")
        and own != "ssm_norm"
    ):
        return tensor + 1
    return tensor.squeeze(1) if own in ("ssm_conv1d", "shortconv") and tensor.dim() == 3 else tensor


def _halves(tensor: Tensor, heads: int, rotated: int) -> Tensor:
    """Of what is rotated of each head, the first rows of all pairs before the second ones."""
    rows = tensor.view(heads, -1, *tensor.shape[1:])
    turned = torch.cat([rows[:, :rotated:2], rows[:, 1:rotated:2], rows[:, rotated:]], 1)
    return turned.reshape(tensor.shape)


def _delta_net(own: str, tensor: Tensor, metadata: Mapping[str, Any], kind: str) -> Tensor:
    """Value heads of all key heads in turn."""
    keys, values = metadata[f"{kind}.ssm.group_count"], metadata[f"{kind}.ssm.time_step_rank"]
    key_rows = 2 * keys * metadata[f"{kind}.ssm.state_size"]

    def in_turn(rows: Tensor) -> Tensor:
        return rows.reshape(keys, values // keys, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)

    if own in ("attn_qkv", "ssm_conv1d"):
        return torch.cat([tensor[:key_rows], in_turn(tensor[key_rows:])])
    if own in ("attn_gate", "ssm_alpha", "ssm_beta", "ssm_dt"):
        return in_turn(tensor)
    if own == "ssm_a":
        return -in_turn(tensor).exp()
    return in_turn(tensor.t()).t().contiguous() if own == "ssm_out" else tensor
