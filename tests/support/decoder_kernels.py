"""What the decoders of all families launch on a GPU, in the sizes of the models themselves: those that `DECODERS` has
for configs that leave them out. Of every decoder one layer of each kind is made, of tensors without memory."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sensorium.checkpoint.decoders import DECODERS
from sensorium.checkpoint.families import FAMILIES, Family, load_class
from sensorium.checkpoint.text_config import AttentionSpec, TextConfig, read_text_config
from sensorium.kernels import Quantization
from sensorium.kernels.context import AttentionContext, KVCache, LayerCache, Segments, StateCache
from sensorium.kernels.cuda.compiling import compiling_for
from sensorium.kernels.gpu import gpu_kernels
from sensorium.models.decoder import Decoder, DecoderModel, SelfAttention
from sensorium.models.layers import Exact, Linear
from sensorium.models.short_conv import StateMixer
from support import fake_cuda

GPU = torch.device("cuda", 0)
STEPS = (([1], 1), ([1] * 3, 3), ([1] * 40, 40), ([1], 0), ([600], 0))
"""Runs of each and how many decode: one, few and many sequences, prompts for each size of tiles."""
PAGES, PAGE = 64, 16
SIZES: dict[str, dict[str, Any]] = {
    name: {"head_dim": 128} for name in ("glm4_moe", "glm4v_moe_text", "qwen3_omni_moe_text")
}
"""What configs of a kind always say, so that nothing stands for it."""
_LARGE = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 2}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, SIZES.get(name, {})) for name in DECODERS},
    "gemma4_text, large": ("gemma4_text", _LARGE),
    "gemma4_text, experts": ("gemma4_text", {**_LARGE, "hidden_size": 2816, "enable_moe_block": True}),
}
"""Name -> `model_type` and more of a config: of every kind, and what one kind may also be."""


@dataclass(frozen=True)
class Launch:
    """One variant of a kernel: what it was started with."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    @functools.cached_property
    def key(self) -> tuple[object, ...]:
        """What Triton compiles by: types, what 16 divides, and constants."""
        return (self.kernel.__name__, *map(_kind, self.args), *sorted(map(str, self.constants.items())))

    @functools.cached_property
    def form(self) -> tuple[object, ...]:
        """The same but for numbers of heads and experts, which change no more than offsets and borders."""
        kept = {name: value for name, value in self.constants.items() if name not in COUNTS}
        return (self.kernel.__name__, *(one.dtype for one in self.args if isinstance(one, Tensor)),
                *sorted(map(str, kept.items())))  # fmt: skip


COUNTS = {"HEADS", "KV_HEADS", "KEY_HEADS", "VALUE_HEADS", "GROUP", "EXPERTS", "CHOSEN", "PER_TOKEN", "PARTS", "GROUPS",
          "GROUPS_TAKEN", "D", "HALF", "ROW", "VALUE_DIM", "KEY_DIM"}  # fmt: skip


def _kind(value: object) -> object:
    if isinstance(value, Tensor):
        return value.dtype, value.storage_offset() * value.dtype.itemsize % 16 == 0
    return (value == 1, value % 16 == 0) if isinstance(value, int) else type(value)


def family_of(model_type: str) -> Family:
    """One whose decoders are of this kind; of several one with media, which makes tokens see ahead."""
    found = [one for one in FAMILIES.values() if one.text_model_type == model_type]
    return max(found, key=lambda one: bool(one.modalities)) if found else FAMILIES["LlamaForCausalLM"]


def config_of(row: str) -> TextConfig:
    """With one layer of each kind."""
    model_type, options = ROWS[row]
    config = read_text_config({"model_type": model_type, **options}, family_of(model_type))
    routed = () if config.routing is None else config.routing.layers
    kinds: dict[object, int] = {}
    for index, spec in enumerate(config.layers):
        kinds.setdefault((replace(spec, source=spec.source and 0), index in routed), index)
    kept = list(kinds.values())
    layers = tuple(_within(config.layers[index], kept) for index in kept)
    if config.routing is None:
        return replace(config, layers=layers)
    places = tuple(place for place, index in enumerate(kept) if index in routed)
    return replace(config, layers=layers, routing=replace(config.routing, layers=places))


def _within(spec: AttentionSpec, kept: list[int]) -> AttentionSpec:
    return spec if spec.source is None else replace(spec, source=0)


def with_one_more(config: TextConfig, place: int) -> TextConfig:
    """The layer at `place` once more, behind the others."""
    more = replace(config, layers=(*config.layers, config.layers[place]))
    if config.routing is None or place not in config.routing.layers:
        return more
    return replace(more, routing=replace(config.routing, layers=(*config.routing.layers, len(config.layers))))


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Kernels are not compiled but kept, each variant once."""
    found: dict[object, Launch] = {}

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        one = Launch(kernel, grid, args, constants)
        found.setdefault(one.key, one)

    made: list[Launch] = []
    with monkeypatch.context() as patch:
        for module in _launching():
            patch.setattr(module, "launch", launch)
        yield made
    made += found.values()


def _launching() -> Iterator[Any]:
    package = importlib.import_module("sensorium.kernels.cuda")
    for one in pkgutil.iter_modules(package.__path__):
        if one.name not in ("build", "launch", "device"):
            module = importlib.import_module(f"{package.__name__}.{one.name}")
            if hasattr(module, "launch"):
                yield module


def layer_launches(
    row: str, quantization: Quantization | None, sequences: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, ...]]:
    """What a layer of each kind adds to what a decode on an H200 launches, for so many sequences each. The second step
    counts: the first one asks for what is kept. Nothing is compiled."""
    config = config_of(row)
    gpu_kernels().switch()
    try:
        with monkeypatch.context() as patch, compiling_for(90), FakeTensorMode(allow_non_fake_inputs=True):
            fake_cuda.count_launches(patch)
            less, *more = [
                _decode_launches(one, row, quantization, sequences)
                for one in (config, *(with_one_more(config, place) for place in range(len(config.layers))))
            ]
    finally:
        gpu_kernels().switch_back()
    return [tuple(many - few for many, few in zip(one, less, strict=True)) for one in more]


def _decode_launches(
    config: TextConfig, row: str, quantization: Quantization | None, sequences: Sequence[int]
) -> list[int]:
    decoder, found = _made(config, row, quantization), []
    for count in sequences:
        _step(decoder, config, [1] * count, count)
        with fake_cuda.Traffic() as traffic:
            _step(decoder, config, [1] * count, count)
        found.append(traffic.launches)
    return found


def launches_of(row: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every variant that the layers of such a decoder start on cards of a compute capability, plain weights in
    bfloat16."""
    config = config_of(row)
    gpu_kernels().switch()
    try:
        with compiling_for(arch), recorded(monkeypatch) as found, FakeTensorMode(allow_non_fake_inputs=True):
            decoder = _made(config, row)
            for lengths, decodes in STEPS:
                _step(decoder, config, lengths, decodes)
            vars(decoder)["stack"] = None  # as steps with adapters are computed
            for lengths, decodes in STEPS[1::2]:
                _step(decoder, config, lengths, decodes)
    finally:
        gpu_kernels().switch_back()
    return found


def _made(config: TextConfig, row: str, quantization: Quantization | None = None) -> Decoder:
    model = load_class(family_of(ROWS[row][0]).model)
    kind: Callable[[TextConfig], Decoder] = model.decoder if issubclass(model, DecoderModel) else Decoder
    with torch.device("meta"):
        decoder = kind(config)
    for module in decoder.modules():
        if isinstance(module, Linear):
            module.allocate(torch.bfloat16, GPU, module.quantization(quantization))
        for name, one in list(module.named_parameters(recurse=False)):
            dtype = torch.float32 if isinstance(module, Exact) else torch.bfloat16
            setattr(module, name, nn.Parameter(torch.empty(one.shape, dtype=dtype, device=GPU), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU))
    return decoder


def _step(decoder: Decoder, config: TextConfig, lengths: list[int], decodes: int) -> None:
    tokens, runs = sum(lengths), len(lengths)

    def empty(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=GPU)

    context = AttentionContext(
        lengths, lengths, decodes, PAGE, empty(runs + 1, dtype=torch.int32), empty(runs, dtype=torch.int32),
        empty(runs, PAGES, dtype=torch.int32), empty(tokens), token_ids=empty(tokens),
        segments=Segments(lengths, decodes, empty(runs), empty(runs)),
    )  # fmt: skip
    if decodes == 0 and any(spec.media_both_ways for spec in config.layers):
        context.visible = empty(tokens, dtype=torch.int32)
    sections = len(config.rope.mrope_section)
    positions = empty(sections, tokens) if sections else empty(tokens)
    hidden = empty(tokens, config.hidden_size, dtype=torch.bfloat16)
    decoder(hidden, positions, _caches(decoder), context)


def _caches(decoder: Decoder) -> KVCache:
    made: KVCache = []
    for layer in decoder.layers:
        mixer = layer.self_attn
        if isinstance(mixer, StateMixer):
            parts = [torch.empty((4, *part.shape), dtype=part.dtype or torch.bfloat16, device=GPU)
                     for part in mixer.state_parts]  # fmt: skip
            made.append(StateCache(tuple(parts)))
        elif isinstance(mixer, SelfAttention):
            size = (PAGES, mixer.attention.num_kv_heads, PAGE, mixer.attention.head_dim)
            keys, values = (torch.empty(size, dtype=torch.bfloat16, device=GPU) for _ in range(2))
            made.append(LayerCache(keys, values))
    return made
