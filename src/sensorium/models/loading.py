"""Checkpoint files -> a loaded model, one tensor at a time, with one copy in memory.

Tensors are views of a memory map (`tensor_files`) that is given back as soon as they are packed. Every key must have
its place and every place its key: whatever is unexpected, missing, duplicate or of another shape is an error that names
it.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.families import load_class
from sensorium.checkpoint.gguf_config import INT4_BLOCK
from sensorium.checkpoint.rerankers import ScoreTokens
from sensorium.errors import CheckpointError
from sensorium.kernels import (
    MAPPED_BYTES,
    Blocks,
    BlockWeight,
    CachedWeight,
    MappedBlocks,
    PackedWeight,
    Quantization,
    QuantizedWeight,
)
from sensorium.kernels.reference.quantized import quantized_bytes
from sensorium.models.base import Model
from sensorium.models.layers import Embedding, Exact, Linear
from sensorium.parallel.ranks import Ranks, Span
from sensorium.weights.checkpoint_files import stored_tensors
from sensorium.weights.disk_cache import QuantizedCopy
from sensorium.weights.joining import join
from sensorium.weights.stored_codes import StoredCodes
from sensorium.weights.tensor_files import StoredTensor, element_of, every, part_of, transposed

logger = logging.getLogger(__name__)

MAX_NAMED = 5  # keys that one error message names

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Stored = StoredTensor | StoredCodes
Renamer = Callable[[str], tuple[str, str, bool | None]]


@dataclass(slots=True)
class _Slot:
    """One declared parameter and the stored tensors that fill it: a whole one ("") or every shard."""

    name: str
    module: nn.Module
    attribute: str
    shape: tuple[int, ...]
    sources: dict[str, Stored]

    def shards(self) -> dict[str, tuple[int, int]]:
        """(first row, rows) of each in the whole parameter, of which a rank may have some rows."""
        return self.module.shards if isinstance(self.module, Linear) else {}

    def stored_shape(self, shard: str) -> tuple[int, ...]:
        """Of what fills it, or this shard of it."""
        whole = self.shape
        if isinstance(self.module, Linear | Embedding) and self.module.is_split:
            whole = self.module.whole[: len(whole)]
        return (self.shards()[shard][1], *whole[1:]) if shard else whole

    def spans(self, first: int, count: int) -> list[Span]:
        """Which rows are to be here of a stored tensor that has `count` of the whole parameter, from `first` on."""
        if not (isinstance(self.module, Linear | Embedding) and self.module.is_split):
            return [Span(first, 0, count)]
        found = []
        for here, start, rows in self.module.spans:
            low, high = max(start, first), min(start + rows, first + count)
            if low < high:
                found.append(Span(here + low - start, low - first, high - low))
        return found

    def holder(self, shard: str) -> Stored | None:
        """What already fills this shard ("": any part of the parameter)."""
        return next((s for name, s in self.sources.items() if not name or not shard or name == shard), None)

    def parts(self) -> Iterator[tuple[Stored, list[Span]]]:
        """Everything that fills the parameter, and which rows of it."""
        for name, source in self.sources.items():
            shape = self.stored_shape(name)
            yield source, self.spans(self.shards()[name][0] if name else 0, shape[0] if shape else 1)

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of all parts, each given back when the next one is asked for."""
        columns = self.module.columns if isinstance(self.module, Linear) and len(self.shape) == 2 else slice(None)
        for source, spans in self.parts():
            for here, first, count in spans:
                for start, rows in source.pieces(first, count):
                    yield here + start - first, rows if columns == slice(None) else rows[:, columns]
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
    ranks: Ranks | None = None,
) -> Model:
    """Build the checkpoint's model on `device` with weights in `dtype`. `progress` hears the part done, from 0 to 1.

    `quantization` is for the linear layers and embeddings under `Model.quantizable`, and for all others too with
    `quantize_towers`. Without it weights that are stored as codes stay codes. `memory_mapped`: a large model's bf16
    weights may be computed from the mapped files, which must not change then. Parameters found in `copy` are reused;
    newly quantised ones are added to it. `ranks`: the part of one of them is loaded.
    """
    stored = stored_tensors(checkpoint.weight_files, checkpoint.text_weight_files)
    tensors: Sequence[Stored] = stored if checkpoint.quantization is None else join(stored, checkpoint.quantization)
    made = load_class(checkpoint.family.model)
    _check_size(checkpoint, tensors)
    checkpoint, tensors = resolve_head(checkpoint, made, tensors, dtype)
    model = _declared(made, checkpoint, ranks)
    fill(
        model,
        tensors,
        dtype=dtype,
        device=torch.device(device),
        quantization=quantization,
        quantize_towers=quantize_towers,
        copy=copy,
        progress=progress,
        memory_mapped=memory_mapped and ranks is None and sum(tensor.nbytes for tensor in tensors) >= MAPPED_BYTES,
    )
    _place_buffers(model, device)
    return model.eval()


def _declared(made: type[Model], checkpoint: Checkpoint, ranks: Ranks | None) -> Model:
    """Without memory. Values that no model is made of are an error of the checkpoint."""
    with torch.device("meta"):
        try:
            model: Model = made(checkpoint)
        except (ArithmeticError, IndexError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"config.json describes no {checkpoint.architecture}: {error}") from error
        if ranks is not None:
            model.split(ranks)
    return model


def _check_size(checkpoint: Checkpoint, tensors: Sequence[Stored]) -> None:
    """Before a model of so many layers and experts is built: each has tensors, each expert numbers."""
    text = checkpoint.text
    if text is None:
        return
    experts = 0 if text.routing is None else len(text.routing.layers) * text.routing.num_experts
    if text.num_layers > len(tensors) or experts > sum(tensor.nbytes for tensor in tensors):
        raise CheckpointError(
            f"config.json states {text.num_layers} layers" + (f" and {experts} experts" if experts else "") + ", "
            f"more than the weights, {len(tensors)} tensors, can hold"
        )


def _place_buffers(model: Model, device: torch.device | str) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


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
    rename = renamer(made)
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
    rename = renamer(made)
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
    packed = sum(weight.nbytes for weight in packed_weights(model))
    return packed + sum(p.nbytes for p in model.parameters() if not p.is_meta)  # else another rank's


def packed_weights(model: Model) -> Iterator[PackedWeight]:
    """Those that are here, and not another rank's."""
    for module in model.modules():
        packed = getattr(module, "packed", None) if isinstance(module, Linear | Embedding) else None
        if packed is not None:
            yield packed


def declared_bytes(model: Model, dtype: torch.dtype, quantization: Quantization | None = None) -> int:
    """What `weight_bytes` will be of a model that has no weights yet, kernels' padding aside; towers as stored."""
    total = 0
    for path, module in model.named_modules():
        wanted = None
        if isinstance(module, Linear | Embedding) and f"{path}.".startswith(model.quantizable):
            wanted = module.quantization(quantization)
        for name, parameter in module.named_parameters(recurse=False):
            if wanted is not None and name == "weight":
                outputs, inputs = parameter.shape
                total += quantized_bytes(outputs, inputs, wanted)
            else:
                is_float32 = isinstance(module, Exact) or wanted is not None  # a quantised layer's bias
                total += parameter.numel() * (torch.float32 if is_float32 else dtype).itemsize
    return total


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
    absent = {id(module) for one in model.elsewhere for module in one.modules()}
    slots = {name: slot for name, slot in slots.items() if id(slot.module) not in absent}
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
            "%d layers are stored in a layout that no kernel takes (fp8, fp4, act-order, 5 to 8 bits in groups or "
            "with zero points): they are kept as int8 with one scale per output",
            anew,
        )


def _assign(model: Model, tensors: Sequence[Stored]) -> dict[str, _Slot]:
    slots = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            slots[name] = _Slot(name, module, attribute, tuple(parameter.shape), {})
    rename = renamer(model)
    is_quantised = model.checkpoint.quantization is not None  # some quantisers give every layer a bias
    unexpected = []
    for stored, target, shard, turn in _parts(tensors, rename):
        if _is_ignored(stored.key, model.ignored) or _is_ignored(target, model.ignored):
            continue
        tensor = stored
        slot = slots.get(model.tied.get(target, target))
        if slot is None or (shard and shard not in slot.shards()):
            is_spare = tensor.key.endswith(".bias") and (is_quantised or target == "lm_head.bias")
            if not (is_spare and _is_zero(tensor)):
                unexpected.append(tensor.key)
            continue
        if turn is not False and isinstance(tensor, StoredTensor) and len(tensor.shape) == 2:
            tensor = _outputs_first(slot, shard, tensor, turn)
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


def _parts(tensors: Sequence[Stored], rename: Renamer) -> Iterator[tuple[Stored, str, str, bool | None]]:
    """(tensor, parameter name, shard, `Rename.inputs_first`) of all; one that holds several parameters as one for each,
    one that holds several shards, named "a+b" or "a|b", as its parts."""
    for tensor in tensors:
        target, shard, turn = rename(tensor.key)
        for element, place in _elements(tensor, target):
            for part, name, inputs_first in _shards(element, shard, turn):
                yield part, place, name, inputs_first


def _elements(tensor: Stored, target: str) -> Iterator[tuple[Stored, str]]:
    """(tensor, parameter name) of each parameter that one tensor holds."""
    if "[*]" not in target or not isinstance(tensor, StoredTensor) or len(tensor.shape) < 2:
        yield tensor, target
        return
    for index in range(tensor.shape[0]):
        yield element_of(tensor, index), target.replace("[*]", str(index))


def _shards(tensor: Stored, shard: str, turn: bool | None) -> Iterator[tuple[Stored, str, bool | None]]:
    """(tensor, shard, `Rename.inputs_first`) of each part of one tensor."""
    takes_turns = "|" in shard
    names = shard.split("|" if takes_turns else "+")
    if len(names) == 1:
        yield tensor, shard, turn
        return
    if turn and isinstance(tensor, StoredTensor):
        tensor, turn = transposed(tensor), False
    rows, rest = divmod(tensor.shape[0], len(names))
    if rest or not (isinstance(tensor, StoredTensor) or takes_turns):
        raise CheckpointError(f"tensor {tensor.key} cannot be cut into {' and '.join(names)}")
    for index, name in enumerate(names):
        if isinstance(tensor, StoredCodes):
            yield tensor.every(index, len(names)), name, turn
        elif takes_turns:
            yield every(tensor, index, len(names)), name, turn
        else:
            yield part_of(tensor, index * rows, rows), name, turn


def _outputs_first(slot: _Slot, shard: str, tensor: StoredTensor, turn: bool | None) -> StoredTensor:
    expected = slot.stored_shape(shard)
    if turn is None and expected[0] == expected[1]:
        raise CheckpointError(
            f"tensor {tensor.key} in {tensor.file.name} is square: its inputs may come first or last, and nothing tells"
        )
    return transposed(tensor) if turn or tensor.shape == expected[::-1] else tensor


def _is_zero(tensor: Stored) -> bool:
    is_zero = not any(rows.any() for _, rows in tensor.pieces())
    tensor.release()
    return is_zero


def _named(keys: list[str]) -> str:
    more = f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
    return ", ".join(keys[:MAX_NAMED]) + more


def _check(slot: _Slot, shard: str, tensor: Stored) -> None:
    expected = slot.stored_shape(shard)
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


def renamer(model: Model | type[Model]) -> Renamer:
    """Checkpoint key -> (parameter name, shard or "", `Rename.inputs_first`)."""
    rows = []
    for row in model.weight_map:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^.]+)", re.escape(row.source))
        rows.append((re.compile(pattern), row.target, row.shard or "", row.inputs_first))

    def rename(key: str) -> tuple[str, str, bool | None]:
        for old, new in model.weight_prefixes.items():
            if key.startswith(old):
                key = new + key[len(old) :]
                break
        for pattern, target, shard, inputs_first in rows:
            match = pattern.fullmatch(key)
            if match is not None:
                return target.format(**match.groupdict()), shard, inputs_first
        return key, "", False

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
        _fill_parameters(module, slots, torch.float32 if isinstance(module, Exact) else dtype, device)
        return False
    weight, is_exact, anew = slots["weight"], False, False
    packed: PackedWeight | None = None
    if memory_mapped and wanted is None and module.least_bits <= 8:
        packed = _over_mapped_blocks(module, weight, dtype, device)
    if packed is None and wanted is None and module.least_bits <= 8:
        wanted, is_exact = _computed_as(weight, device)
        anew = wanted is not None and not is_exact
    wanted = _settled(module, weight, wanted)
    bias = None if getattr(module, "bias", None) is None else slots["bias"]  # another rank may be the one to add it
    mapped = _mapped_rows(weight, dtype, device) if memory_mapped and wanted is None and packed is None else []
    if packed is None and wanted is None and isinstance(module, Embedding):
        if len(mapped) == 1:
            module.weight = nn.Parameter(mapped[0][1], requires_grad=False)
        else:
            _fill_parameters(module, slots, dtype, device)
        return False
    if wanted is not None:
        packed = _quantized(module, weight, wanted, dtype, device, is_exact=is_exact, copy=copy)
    elif mapped and isinstance(module, Linear):
        packed = _over_mapped_rows(module, weight, mapped)
    if packed is None:
        packed = module.allocate(dtype, device)
        _fill_rows(packed, weight, dtype)
    if bias is not None:
        packed.set_bias(_whole(bias, dtype, device))
    return anew


def _over_mapped_rows(module: Linear, weight: _Slot, rows: list[tuple[int, Tensor]]) -> PackedWeight | None:
    packed = module.map(rows)
    if packed is not None:
        _populate(weight)
    return packed


def _settled(module: Linear | Embedding, weight: _Slot, wanted: Quantization | None) -> Quantization | None:
    """`wanted`, of the rows that the layer then has."""
    module.settle(wanted)
    return replace(wanted, blocks=_kept_blocks(weight)) if wanted is not None and wanted.blocks else wanted


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
        (spans[0].here, source)
        for source, spans in weight.parts()
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
    if exact is None and not all(source.becomes_int8 for source in codes):
        return None, False
    return exact or Quantization(8), exact is not None


def _computed_as(weight: _Slot, device: torch.device) -> tuple[Quantization | None, bool]:
    """`_stored_quantization`, where the device has a kernel for it."""
    blocks = _kept_blocks(weight) if device.type == "cpu" else ()
    if blocks and any(form != INT4_BLOCK for _, form in blocks):
        return Quantization(8, blocks=blocks), True
    found, is_exact = _stored_quantization(weight)
    if found is None or not found.floats:
        return found, is_exact
    if found.is_fp8:
        return (Quantization(8), False) if device.type == "cpu" else (found, is_exact)
    return (found if kernels.multiplies_fp4(device) else None), is_exact  # bf16 holds them exactly


def _kept_blocks(weight: _Slot) -> Blocks:
    """Which rows have which form, if all are stored in blocks that are multiplied as they are."""
    found: list[tuple[int, str]] = []
    parts = [(span, source) for source, spans in weight.parts() for span in spans]
    for span, source in sorted(parts, key=lambda part: part[0].here):
        kind = source.kept_blocks if isinstance(source, StoredCodes) else None
        if kind is None:
            return ()
        before = found.pop()[0] if found and found[-1][1] == kind else 0
        found.append((before + span.rows, kind))
    return tuple(found)


def _over_mapped_blocks(
    module: Linear | Embedding, weight: _Slot, dtype: torch.dtype, device: torch.device
) -> PackedWeight | None:
    """A weight over blocks where the file has them; None where that is not possible."""
    if device.type != "cpu":
        return None
    codes = [(source, spans) for source, spans in weight.parts() if isinstance(source, StoredCodes)]
    if len(codes) < len(weight.sources):
        return None
    parts: list[MappedBlocks] = []
    for source, spans in codes:
        for span in spans:
            runs = source.mapped(span)
            if runs is None:
                return None
            firsts = itertools.accumulate((len(rows) for rows in runs), initial=span.here)
            release = source.release
            parts += [
                MappedBlocks(first, source.kept_blocks or "", rows, release)
                for first, rows in zip(firsts, runs, strict=False)
            ]
    packed = module.map_blocks(parts, dtype)
    if packed is not None:
        for source, _ in codes:
            source.populate()
    return packed


def _put_codes(packed: QuantizedWeight, quantization: Quantization, weight: _Slot) -> None:
    if quantization.blocks:
        for source, spans in weight.parts():
            for span in spans:
                cast("StoredCodes", source).put_blocks(cast("BlockWeight", packed), span)
            source.release()
        return
    parts = [(source, spans) for source, spans in weight.parts() if isinstance(source, StoredCodes)]
    with_zeros = not all(source.is_symmetric() for source, _ in parts)
    for source, spans in parts:
        for span in spans:
            source.put(packed, span, quantization, with_zeros=with_zeros)
        source.release()


def _fill_parameters(module: nn.Module, slots: dict[str, _Slot], dtype: torch.dtype, device: torch.device) -> None:
    for name, slot in slots.items():
        setattr(module, name, nn.Parameter(_whole(slot, dtype, device), requires_grad=False))


def _whole(slot: _Slot, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A parameter; of a linear layer the bias, whose rows are those of the weight."""
    shape = (slot.module.out_features,) if isinstance(slot.module, Linear) else slot.shape
    value = torch.empty(shape, dtype=dtype, device=device)
    filled = value if value.dim() else value.view(1)
    for first, rows in slot.pieces():
        filled[first : first + rows.shape[0]].copy_(rows)
    return value
