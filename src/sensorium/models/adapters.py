"""LoRA: what an adapter adds to the linear layers of a decoder, and to which tokens of a step.

y = W x becomes y = W x + B A x for the tokens of an adapter's sequences, whatever W is stored as; the scale is in B.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, read_adapter_config
from sensorium.errors import CheckpointError
from sensorium.kernels import LowRank
from sensorium.models.base import Model
from sensorium.models.decoder import DecoderLayer, SelfAttention
from sensorium.models.layers import MLP, Linear
from sensorium.models.loading import renamer
from sensorium.parallel.ranks import Span
from sensorium.weights.tensor_files import StoredTensor, read_safetensors

PREFIX = "base_model.model."
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_EXPERT = re.compile(r"\.experts(\.|$)")
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_NAMED = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "an adapter of the embeddings",
    "modules_to_save": "modules_to_save",
    ".bias": "a bias",
}
"""What is in a key -> what it is, of keys that are refused."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """`digest` is of its files: what is computed with it depends on nothing else of it."""

    number: int  # by which requests, and the ranks of a model, call it
    digest: bytes
    additions: Mapping[nn.Module, LowRank]

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.additions.values())


class StepAdapters:
    """The adapters of a step, each with its tokens: int64 [n], or None for all of them."""

    __slots__ = ("_tokens", "groups")

    def __init__(self, groups: Sequence[tuple[Adapter, Tensor | None]]) -> None:
        self.groups = groups
        self._tokens = kernels.TokenGroups([rows for _, rows in groups])

    def rows(self) -> dict[int, Tensor | None]:
        """By the adapters' numbers."""
        return {adapter.number: rows for adapter, rows in self.groups}

    def moved(self, device: torch.device) -> StepAdapters:
        """The same with the tokens' numbers on a device."""
        moved = [(one, None if rows is None else rows.to(device, non_blocking=True)) for one, rows in self.groups]
        return StepAdapters(moved)

    def add(self, module: nn.Module, out: Tensor, x: Tensor) -> None:
        """What they add to `out` = module(x), in place."""
        kernels.add_low_rank(out, x, [adapter.additions.get(module) for adapter, _ in self.groups], self._tokens)


def adaptable(model: Model) -> dict[str, Linear]:
    """The linear layers that may be adapted, by their names."""
    return {
        f"{path}.{name}.{leaf}": getattr(getattr(layer, name), leaf)
        for path, layer in model.named_modules()
        if type(layer) is DecoderLayer and type(layer.self_attn) is SelfAttention
        for name, leaves in (("self_attn", ("qkv_proj", "o_proj")), ("mlp", ("gate_up_proj", "down_proj")))
        if name != "mlp" or type(layer.mlp) is MLP
        for leaf in leaves
    }


@dataclass(slots=True)
class _Pair:
    """The two matrices of one module of the checkpoint."""

    module: str  # as the adapter's file has it
    stored: dict[str, StoredTensor] = field(default_factory=dict)  # by "A" and "B"
    place: str = ""  # of the linear layer
    shards: tuple[str, ...] = ()  # of its rows; none: all of them

    def tensor(self, part: str) -> StoredTensor:
        if part not in self.stored:
            raise CheckpointError(f"{WEIGHTS_FILE} has no {self.module}.lora_{part}.weight, and the other one")
        return self.stored[part]


def load_adapter(
    model: Model, folder: Path, number: int = 0, *, dtype: torch.dtype, device: torch.device | str
) -> Adapter:
    """Read and check everything. CheckpointError says in one line what is wrong, or not served."""
    layers = adaptable(model)
    if not layers:
        raise CheckpointError(f"{model.checkpoint.architecture} takes no LoRA adapters")
    config = read_adapter_config(folder)
    pairs = _pairs(read_safetensors(folder / WEIGHTS_FILE))
    rename = renamer(model)
    placed: dict[str, list[_Pair]] = {}
    for pair in pairs:
        name, shard, _ = rename(f"{pair.module}.weight")
        pair.place, pair.shards = name.removesuffix(".weight"), tuple(shard.split("+")) if shard else ()
        if pair.place not in layers:
            if not pair.tensor("B").view().any():
                continue  # never trained, as of towers that saw no image: it adds nothing
            if _EXPERT.search(pair.place):
                raise CheckpointError(f"{WEIGHTS_FILE}: {pair.module} is of experts, whose adapters are not served")
            raise CheckpointError(f"{WEIGHTS_FILE}: {pair.module} is no linear layer of the decoder, others have none")
        if not config.targets(pair.module):
            raise CheckpointError(f"{CONFIG_FILE}: target_modules does not name {pair.module}, which has tensors")
        placed.setdefault(pair.place, []).append(pair)
    _check_complete(config, pairs, placed, layers)
    with torch.no_grad():
        additions: dict[nn.Module, LowRank] = {
            layers[place]: _addition(layers[place], own, config, dtype, device) for place, own in placed.items()
        }
    return Adapter(number, _digest(folder), additions)


def _digest(folder: Path) -> bytes:
    found = sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        content = (folder / name).read_bytes()
        found.update(len(content).to_bytes(8, "little") + content)
    return found.digest()


def _pairs(tensors: Sequence[StoredTensor]) -> list[_Pair]:
    found: dict[str, _Pair] = {}
    for tensor in tensors:
        match = _KEY.fullmatch(tensor.key)
        if match is None:
            what = next((title for part, title in _NAMED.items() if part in tensor.key), "no matrix of LoRA")
            raise CheckpointError(f"{WEIGHTS_FILE}: {tensor.key} is {what}, which is not served")
        if tensor.dtype not in _FLOATS or len(tensor.shape) != 2:
            raise CheckpointError(f"{WEIGHTS_FILE}: {tensor.key} is no matrix of floats")
        module = match["module"].removeprefix(PREFIX)
        found.setdefault(module, _Pair(module)).stored[match["part"]] = tensor
    if not found:
        raise CheckpointError(f"{WEIGHTS_FILE} has no tensors")
    return list(found.values())


def _check_complete(
    config: AdapterConfig, pairs: Sequence[_Pair], placed: Mapping[str, Sequence[_Pair]], layers: Mapping[str, Linear]
) -> None:
    """What is named has tensors, and in every layer, unless the configuration chooses layers."""
    if config.target_modules is None or not config.is_of_all_layers:
        return
    for name in config.target_modules:
        if not any(pair.module == name or pair.module.endswith(f".{name}") for pair in pairs):
            raise CheckpointError(f"{WEIGHTS_FILE} has no tensors of {name}, which target_modules names")
    if any("." in name for name in config.target_modules):
        return
    kinds = {(place.rpartition(".")[2], pair.shards) for place, own in placed.items() for pair in own}
    for place in layers:
        here = {pair.shards for pair in placed.get(place, ())}
        for leaf, shards in kinds:
            if place.endswith(f".{leaf}") and shards not in here:
                what = f"{place} ({', '.join(shards)})" if shards else place
                raise CheckpointError(f"{WEIGHTS_FILE} has no tensors of {what}, as other layers have")


def _addition(
    layer: Linear, pairs: Sequence[_Pair], config: AdapterConfig, dtype: torch.dtype, device: torch.device | str
) -> LowRank:
    narrow, parts = [], []
    for pair in pairs:
        adapted = [layer.shards[shard] for shard in pair.shards] or [(0, layer.whole[0])]
        rank, outputs = config.rank_of(pair.module), sum(rows for _, rows in adapted)
        inner = _matrix(pair, "A", (rank, layer.whole[1]))[:, layer.columns]
        outer = _matrix(pair, "B", (outputs, rank)) * config.scale_of(pair.module)
        start = 0
        for first, rows in adapted:
            for here, at, count in _here(layer, first, rows):
                narrow.append(inner.to(dtype))
                begin = start + at - first
                parts.append((here, outer[begin : begin + count].to(device, dtype).contiguous()))
            start += rows
    return LowRank(torch.cat(narrow).to(device).contiguous(), parts)


def _here(layer: Linear, first: int, rows: int) -> Iterator[Span]:
    """Which of rows [first, first + rows) of the whole weight the layer has, and where."""
    for span in layer.spans:
        begin, end = max(first, span.first), min(first + rows, span.first + span.rows)
        if begin < end:
            yield Span(span.here + begin - span.first, begin, end - begin)


def _matrix(pair: _Pair, part: str, shape: tuple[int, int]) -> Tensor:
    """float32"""
    tensor = pair.tensor(part)
    if tensor.shape != shape:
        raise CheckpointError(
            f"{WEIGHTS_FILE}: {tensor.key} has shape {list(tensor.shape)}, "
            f"the base and {CONFIG_FILE} need {list(shape)}"
        )
    found = tensor.view().float()
    tensor.release()
    if not found.isfinite().all():
        raise CheckpointError(f"{WEIGHTS_FILE}: {tensor.key} has numbers that are not finite")
    return found
