"""Checkpoint files -> a loaded model, one tensor at a time, with one copy in memory.

Tensors are views of a memory map (`tensor_files`) that is given back as soon as they are packed. Every key must have
its place and every place its key: whatever is unexpected, missing, duplicate or of another shape is an error that names
it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.families import load_class
from sensorium.checkpoint.rerankers import ScoreTokens
from sensorium.errors import CheckpointError
from sensorium.kernels import CachedWeight, PackedWeight, Quantization, QuantizedWeight
from sensorium.models.base import Model
from sensorium.models.layers import Embedding, Head, Linear
from sensorium.weights.disk_cache import QuantizedCopy
from sensorium.weights.stored_codes import StoredCodes, join
from sensorium.weights.tensor_files import StoredTensor, part_of, stored_tensors

logger = logging.getLogger(__name__)

MAX_NAMED = 5  # keys that one error message names
MAPPED_BYTES = 512 * 1024 * 1024  # of a checkpoint; packing a smaller one takes little time, and it computes faster

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Stored = StoredTensor | StoredCodes


@dataclass(slots=True)
class _Slot:
    """One declared parameter and the stored tensors that fill it: a whole one ("") or every shard."""

    name: str
    module: nn.Module
    attribute: str
    shape: tuple[int, ...]
    sources: dict[str, Stored]

    def shards(self) -> dict[str, tuple[int, int]]:
        return self.module.shards if isinstance(self.module, Linear) else {}

    def holder(self, shard: str) -> Stored | None:
        """What already fills this shard ("": any part of the parameter)."""
        return next((s for name, s in self.sources.items() if not name or not shard or name == shard), None)

    def parts(self) -> list[tuple[int, Stored]]:
        """(first row, tensor) of everything that fills the parameter."""
        return [(self.shards()[name][0] if name else 0, source) for name, source in self.sources.items()]

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of all parts, each given back when the next one is asked for."""
        for first, source in self.parts():
            for start, rows in source.pieces():
                yield first + start, rows
            source.release()

    def missing(self) -> list[str]:
        if "" in self.sources or (self.sources and self.sources.keys() == self.shards().keys()):
            return []
        absent = [name for name in self.shards() if name not in self.sources]
        return [f"{self.name} ({', '.join(absent)})" if self.sources else self.name]


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: Quantization | None = None,
    quantize_towers: bool = False,
    memory_mapped: bool = False,
    copy: QuantizedCopy | None = None,
    progress: Callable[[float], None] | None = None,
) -> Model:
    """Build the checkpoint's model on `device` with weights in `dtype`. `progress` hears the part done, from 0 to 1.

    `quantization` is for the linear layers and embeddings under `Model.quantizable`, and for all others too with
    `quantize_towers`. Without it weights that are stored as codes stay codes. `memory_mapped`: a large model's bf16
    weights may be computed from the mapped files, which must not change then. Parameters found in `copy` are reused;
    newly quantised ones are added to it.
    """
    stored = stored_tensors(checkpoint.weight_files, checkpoint.text_weight_files)
    tensors: Sequence[Stored] = stored if checkpoint.quantization is None else join(stored, checkpoint.quantization)
    made = load_class(checkpoint.family.model)
    checkpoint, tensors = resolve_head(checkpoint, made, tensors, dtype)
    with torch.device("meta"):
        model: Model = made(checkpoint)
    fill(
        model,
        tensors,
        dtype=dtype,
        device=torch.device(device),
        quantization=quantization,
        quantize_towers=quantize_towers,
        copy=copy,
        progress=progress,
        memory_mapped=memory_mapped and sum(tensor.nbytes for tensor in tensors) >= MAPPED_BYTES,
    )
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()


def resolve_head(
    checkpoint: Checkpoint, made: type[Model], tensors: Sequence[Stored], dtype: torch.dtype
) -> tuple[Checkpoint, Sequence[Stored]]:
    """What the stored tensors say of the language head, which config.json may tell differently.

    A head that is stored and is not the embeddings is kept, tied or not, as transformers does; one that equals them is
    left out, so that it takes no memory. Where there is none, stored or tied, the model only embeds. Where a score is
    made of some tokens' rows, they are all that is kept.
    """
    text = checkpoint.text
    if checkpoint.score_tokens is not None:
        return checkpoint, [*tensors, score_rows(checkpoint.score_tokens, checkpoint, made, tensors)]
    if text is None or not {"generate", "transcribe"} & set(checkpoint.family.tasks):
        return checkpoint, tensors
    rename = _renamer(made)
    places = {rename(tensor.key)[0]: tensor for tensor in tensors}
    head, embeddings = places.get("lm_head.weight"), places.get("model.embed_tokens.weight")
    if head is None and not text.tie_word_embeddings:
        logger.warning("the checkpoint has no language head (lm_head): it embeds, and cannot generate")
        return replace(checkpoint, text=replace(text, has_head=False)), tensors
    if head is None or embeddings is None or not text.tie_word_embeddings:
        return checkpoint, tensors
    if _are_equal(head, embeddings, dtype):
        return checkpoint, [tensor for tensor in tensors if tensor is not head]
    logger.warning(
        "config.json ties the language head to the embeddings, but %s is stored and differs from %s: the "
        "stored head is used",
        head.key,
        embeddings.key,
    )
    return replace(checkpoint, text=replace(text, tie_word_embeddings=False)), tensors


def score_rows(
    tokens: ScoreTokens, checkpoint: Checkpoint, made: type[Model], tensors: Sequence[Stored]
) -> StoredTensor:
    """`score.weight` of a classifier, float32, out of the rows of the language head that these tokens have."""
    rename = _renamer(made)
    places = {rename(tensor.key)[0]: tensor for tensor in tensors}
    if "score.weight" in places:
        raise CheckpointError(
            f"the checkpoint has a score of its own ({places['score.weight'].key}): classifier_from_token must be null"
        )
    is_tied = checkpoint.text is not None and checkpoint.text.tie_word_embeddings
    head = places.get("lm_head.weight") or (places.get("model.embed_tokens.weight") if is_tied else None)
    if head is None:
        raise CheckpointError("the checkpoint has no language head (lm_head), whose tokens would make the score")
    wanted = [*tokens.kept, *([] if tokens.subtracted is None else [tokens.subtracted])]
    if max(wanted) >= head.shape[0] or min(wanted) < 0:
        raise CheckpointError(f"the score is made of token {max(wanted)}; the language head has {head.shape[0]} rows")
    with torch.device("cpu"):
        found = {
            one: rows[one - first].float().clone()
            for first, rows in head.pieces()
            for one in wanted
            if first <= one < first + len(rows)
        }
        head.release()
        weight = torch.stack([found[one] for one in tokens.kept])
        if tokens.subtracted is not None:
            weight = weight - found[tokens.subtracted]
    return StoredTensor(
        "score.weight",
        head.file,
        tuple(weight.shape),
        weight.dtype,
        view=lambda: weight,
        prefetch=lambda: None,
        release=lambda: None,
    )


def _are_equal(one: Stored, other: Stored, dtype: torch.dtype) -> bool:
    """Whether both are plain numbers, and the same ones in this dtype."""
    if not (isinstance(one, StoredTensor) and isinstance(other, StoredTensor)) or one.shape != other.shape:
        return False
    its = other.view()
    return all(torch.equal(rows.to(dtype), its[start : start + len(rows)].to(dtype)) for start, rows in one.pieces())


def weight_bytes(model: Model) -> int:
    """Memory of everything loaded: packed weights and plain parameters."""
    packed = sum(
        module.packed.nbytes
        for module in model.modules()
        if isinstance(module, Linear | Embedding) and module.packed is not None
    )
    return packed + sum(p.nbytes for p in model.parameters())


def fill(
    model: Model,
    tensors: Sequence[Stored],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
    quantize_towers: bool = False,
    memory_mapped: bool = False,
    copy: QuantizedCopy | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Give every declared parameter its memory and contents."""
    slots = _assign(model, tensors)
    total = sum(s.nbytes for slot in slots.values() for s in slot.sources.values()) or 1
    done = anew = 0
    groups = _by_module(slots)
    for index, (module, group) in enumerate(groups):
        if copy is None or copy.is_empty:
            for source in _sources(groups[index + 1 : index + 2]):  # the disk works while this one is packed
                source.prefetch()
        wanted = None
        if isinstance(module, Linear | Embedding):
            is_quantizable = next(iter(group.values())).name.startswith(model.quantizable)
            wanted = module.quantization(quantization if is_quantizable or quantize_towers else None)
        anew += _fill_module(module, group, dtype, device, wanted, memory_mapped=memory_mapped, copy=copy)
        done += sum(source.nbytes for source in _sources([(module, group)]))
        if progress is not None:
            progress(done / total)
    if anew:
        logger.warning(
            "%d layers are stored in a layout that no kernel takes (act-order, or 8 bits in groups or with "
            "zero points): they are kept as int8 with one scale per output",
            anew,
        )


def _assign(model: Model, tensors: Sequence[Stored]) -> dict[str, _Slot]:
    slots = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            slots[name] = _Slot(name, module, attribute, tuple(parameter.shape), {})
    rename = _renamer(model)
    is_quantised = model.checkpoint.quantization is not None  # some quantisers give every layer a bias
    unexpected = []
    for tensor, target, shard in _parts(tensors, rename):
        if _is_ignored(tensor.key, model.ignored) or _is_ignored(target, model.ignored):
            continue
        slot = slots.get(model.tied.get(target, target))
        if slot is None or (shard and shard not in slot.shards()):
            is_spare = tensor.key.endswith(".bias") and (is_quantised or target == "lm_head.bias")
            if not (is_spare and _is_zero(tensor)):
                unexpected.append(tensor.key)
            continue
        _check(slot, shard, tensor)
        other = slot.holder(shard)
        if other is None or target in model.tied:  # a tied head may be stored too; the embedding counts
            slot.sources[shard] = tensor
        elif slot.name not in model.tied.values():
            raise CheckpointError(f"tensors {other.key} and {tensor.key} are both {slot.name}")
    missing = [name for slot in slots.values() for name in slot.missing()]
    if unexpected or missing:
        said = [f"{what} {_named(keys)}" for what, keys in (("unexpected", unexpected), ("missing", missing)) if keys]
        raise CheckpointError(f"weights do not fit {model.checkpoint.architecture}: {'; '.join(said)}")
    return slots


def _parts(tensors: Sequence[Stored], rename: Callable[[str], tuple[str, str]]) -> Iterator[tuple[Stored, str, str]]:
    """(tensor, parameter name, shard) of all; one that holds several shards, named "a+b", as its equal parts."""
    for tensor in tensors:
        target, shard = rename(tensor.key)
        names = shard.split("+")
        if len(names) == 1:
            yield tensor, target, shard
            continue
        rows, rest = divmod(tensor.shape[0], len(names))
        if isinstance(tensor, StoredCodes) or rest:
            raise CheckpointError(f"tensor {tensor.key} cannot be cut into {' and '.join(names)}")
        for index, name in enumerate(names):
            yield part_of(tensor, index * rows, rows), target, name


def _is_zero(tensor: Stored) -> bool:
    is_zero = not any(rows.any() for _, rows in tensor.pieces())
    tensor.release()
    return is_zero


def _named(keys: list[str]) -> str:
    more = f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
    return ", ".join(keys[:MAX_NAMED]) + more


def _check(slot: _Slot, shard: str, tensor: Stored) -> None:
    expected = (slot.shards()[shard][1], *slot.shape[1:]) if shard else slot.shape
    if tensor.shape != expected:
        raise CheckpointError(
            f"tensor {tensor.key} in {tensor.file.name} has shape {list(tensor.shape)}, "
            f"the configuration needs {list(expected)}"
        )
    if isinstance(tensor, StoredTensor) and tensor.dtype not in _FLOATS:
        raise CheckpointError(
            f"tensor {tensor.key} in {tensor.file.name} is {tensor.dtype}: config.json does not say how it is quantised"
        )


def _is_ignored(key: str, patterns: tuple[str, ...]) -> bool:
    return any(key.endswith(p) or key.startswith(p) for p in patterns)


def _renamer(model: Model | type[Model]) -> Callable[[str], tuple[str, str]]:
    """Checkpoint key -> (parameter name, shard or "")."""
    rows = []
    for row in model.weight_map:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^.]+)", re.escape(row.source))
        rows.append((re.compile(pattern), row.target, row.shard or ""))

    def rename(key: str) -> tuple[str, str]:
        for old, new in model.weight_prefixes.items():
            if key.startswith(old):
                key = new + key[len(old) :]
                break
        for pattern, target, shard in rows:
            match = pattern.fullmatch(key)
            if match is not None:
                return target.format(**match.groupdict()), shard
        return key, ""

    return rename


def _by_module(slots: dict[str, _Slot]) -> list[tuple[nn.Module, dict[str, _Slot]]]:
    groups: dict[int, tuple[nn.Module, dict[str, _Slot]]] = {}
    for slot in slots.values():
        groups.setdefault(id(slot.module), (slot.module, {}))[1][slot.attribute] = slot
    return list(groups.values())


def _sources(groups: list[tuple[nn.Module, dict[str, _Slot]]]) -> list[Stored]:
    return [source for _, group in groups for slot in group.values() for source in slot.sources.values()]


def _fill_module(
    module: nn.Module,
    slots: dict[str, _Slot],
    dtype: torch.dtype,
    device: torch.device,
    wanted: Quantization | None,
    *,
    memory_mapped: bool = False,
    copy: QuantizedCopy | None = None,
) -> bool:
    """Whether codes of the checkpoint had to be quantised anew, though nobody asked for it."""
    if not isinstance(module, Linear | Embedding):
        _fill_parameters(module, slots, torch.float32 if isinstance(module, Head) else dtype, device)
        return False
    weight, is_exact, anew = slots["weight"], False, False
    if wanted is None and module.least_bits <= 8:
        wanted, is_exact = _stored_quantization(weight)
        anew = wanted is not None and not is_exact
    mapped = _mapped_rows(weight, dtype, device) if memory_mapped and wanted is None else []
    if wanted is None and isinstance(module, Embedding):
        if len(mapped) == 1:
            module.weight = nn.Parameter(mapped[0][1], requires_grad=False)
        else:
            _fill_parameters(module, slots, dtype, device)
        return False
    packed: PackedWeight | None = None
    if wanted is not None:
        packed = _quantized(module, weight, wanted, dtype, device, is_exact=is_exact, copy=copy)
    elif mapped and isinstance(module, Linear):
        packed = module.map(mapped)
        if packed is not None:
            _populate(weight)
    if packed is None:
        packed = module.allocate(dtype, device)
        _fill_rows(packed, weight, dtype)
    if "bias" in slots:
        packed.set_bias(_whole(slots["bias"], dtype, device))
    return anew


def _quantized(
    module: Linear | Embedding,
    weight: _Slot,
    wanted: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_exact: bool,
    copy: QuantizedCopy | None,
) -> PackedWeight:
    """The quantised weight, without its bias. `is_exact`: its codes are in the checkpoint, so no copy keeps them."""
    if is_exact:
        packed = module.allocate(dtype, device, wanted)
        _put_codes(cast("QuantizedWeight", packed), wanted, weight)
        return packed
    restored = None if copy is None else _restored(module, weight.name, wanted, copy)
    if restored is not None:
        return restored
    packed = module.allocate(dtype, device, wanted)
    _fill_rows(packed, weight, dtype)
    if copy is not None:
        copy.add(weight.name, cast("CachedWeight", packed).parts())
    return packed


def _fill_rows(packed: PackedWeight, weight: _Slot, dtype: torch.dtype) -> None:
    for first, rows in weight.pieces():
        packed.fill(first, rows.flatten(1).to(dtype))


def _restored(
    module: Linear | Embedding, name: str, quantization: Quantization, copy: QuantizedCopy
) -> QuantizedWeight | None:
    """The parameter as it was quantised at an earlier start."""
    kept = copy.parts(name)
    if kept is None:
        return None
    try:
        return module.restore(kept, quantization)
    except (KeyError, ValueError) as error:
        copy.discard(f"{name}: {error}")
        return None


def _mapped_rows(weight: _Slot, dtype: torch.dtype, device: torch.device) -> list[tuple[int, Tensor]]:
    """(first row, rows) of all parts as memory-mapped tensors; empty if one has another dtype or is not mapped."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return []
    parts = [
        (first, source)
        for first, source in weight.parts()
        if isinstance(source, StoredTensor) and source.dtype == dtype and source.populate is not None
    ]
    if len(parts) < len(weight.sources):
        return []
    return [(first, source.view().flatten(1)) for first, source in parts]


def _populate(weight: _Slot) -> None:
    for source in weight.sources.values():
        if isinstance(source, StoredTensor) and source.populate is not None:
            source.populate()


def _stored_quantization(weight: _Slot) -> tuple[Quantization | None, bool]:
    """(quantisation of a weight all of whose parts are stored as codes, whether it holds just these codes)"""
    codes = [source for source in weight.sources.values() if isinstance(source, StoredCodes)]
    if not codes or len(codes) < len(weight.sources):
        return None, False
    found = {source.quantization() for source in codes}
    exact = found.pop() if len(found) == 1 else None
    return exact or Quantization(8), exact is not None


def _put_codes(packed: QuantizedWeight, quantization: Quantization, weight: _Slot) -> None:
    parts = [(first, source) for first, source in weight.parts() if isinstance(source, StoredCodes)]
    with_zeros = not all(source.is_symmetric() for _, source in parts)
    for first, source in parts:
        source.put(packed, first, quantization, with_zeros=with_zeros)
        source.release()


def _fill_parameters(module: nn.Module, slots: dict[str, _Slot], dtype: torch.dtype, device: torch.device) -> None:
    for name, slot in slots.items():
        setattr(module, name, nn.Parameter(_whole(slot, dtype, device), requires_grad=False))


def _whole(slot: _Slot, dtype: torch.dtype, device: torch.device) -> Tensor:
    value = torch.empty(slot.shape, dtype=dtype, device=device)
    filled = value if value.dim() else value.view(1)
    for first, rows in slot.pieces():
        filled[first : first + rows.shape[0]].copy_(rows)
    return value
