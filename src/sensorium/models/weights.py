"""Checkpoint files -> a loaded model, one tensor at a time, with one copy in memory.

Tensors are views of a memory map that is given back as soon as they are packed. Every key must have its place and every
place its key: whatever is unexpected, missing, duplicate or of another shape is an error that names it.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import mmap
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sensorium.checkpoint import Checkpoint
from sensorium.errors import CheckpointError
from sensorium.kernels import Quantization, QuantizedForm
from sensorium.models.base import Model
from sensorium.models.layers import Embedding, Linear
from sensorium.models.packed import StoredCodes, join
from sensorium.models.registry import FAMILIES, load_class

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 100 * 1024 * 1024
MAX_NAMED = 5  # keys that one error message names
MAPPED_BYTES = 512 * 1024 * 1024  # of a checkpoint; packing a smaller one takes little time, and it computes faster
MADV_POPULATE_READ = 22  # of Linux; Python has no name for it
CONVERT_BYTES = 32 * 1024 * 1024  # of a tensor in another dtype that are converted at once

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, not read yet."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    view: Callable[[], Tensor]  # in borrowed memory
    prefetch: Callable[[], None]  # starts reading from the disk
    release: Callable[[], None]  # gives the view's pages back
    populate: Callable[[], None] | None = None  # reads all of it now; None: `view` is no plain mapping of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the whole tensor: so many that their conversion to another dtype takes little memory."""
        rows = self.view()
        step = max(1, CONVERT_BYTES * rows.shape[0] // max(1, rows.nbytes))
        for start in range(0, rows.shape[0], step):
            yield start, rows[start : start + step]


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


def load_model(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str,
               quantization: Quantization | None = None, quantize_towers: bool = False, in_place: bool = False,
               progress: Callable[[float], None] | None = None) -> Model:
    """Build the checkpoint's model on `device` with weights in `dtype`. `progress` hears the part done, from 0 to 1.

    `quantization` is for the linear layers and embeddings of the model's core, and of all of it if the towers are meant
    too. Without it weights that are stored as codes stay codes. `in_place`: a large model's bf16 weights may stay where
    the page cache has them; its files must not change then.
    """
    with torch.device("meta"):
        model: Model = load_class(FAMILIES[checkpoint.architecture].model)(checkpoint)
    stored = stored_tensors(checkpoint.weight_files, checkpoint.text_weight_files)
    tensors = [*stored] if checkpoint.quantization is None else join(stored, checkpoint.quantization)
    fill(model, tensors, dtype=dtype, device=torch.device(device), quantization=quantization,
         quantize_towers=quantize_towers, progress=progress,
         in_place=in_place and sum(tensor.nbytes for tensor in tensors) >= MAPPED_BYTES)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()


def weight_bytes(model: Model) -> int:
    """Memory of everything loaded: packed forms and plain parameters."""
    packed = sum(module.form.nbytes for module in model.modules()
                 if isinstance(module, Linear | Embedding) and module.form is not None)
    return packed + sum(p.nbytes for p in model.parameters())


def stored_tensors(files: Iterable[Path], text_files: Iterable[Path] = ()) -> list[StoredTensor]:
    """The tensors of all files of one checkpoint; a key that two files have is an error.

    `text_files` are a second repository's: their keys get the prefix `language_model.` and yield to the first's.
    """
    own = _tensors_of(files)
    second = [replace(tensor, key=f"language_model.{tensor.key}") for tensor in _tensors_of(text_files).values()]
    return [*own.values(), *(tensor for tensor in second if tensor.key not in own)]


def _tensors_of(files: Iterable[Path]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file):
            if tensor.key in found:
                raise CheckpointError(f"{tensor.key} is in {found[tensor.key].file.name} and again in {file.name}")
            found[tensor.key] = tensor
    return found


def fill(model: Model, tensors: Sequence[Stored], *, dtype: torch.dtype, device: torch.device,
         quantization: Quantization | None = None, quantize_towers: bool = False, in_place: bool = False,
         progress: Callable[[float], None] | None = None) -> None:
    """Give every declared parameter its memory and contents."""
    slots = _assign(model, tensors)
    total = sum(s.nbytes for slot in slots.values() for s in slot.sources.values()) or 1
    done = anew = 0
    groups = _by_module(slots)
    for index, (module, group) in enumerate(groups):
        for source in _sources(groups[index + 1 : index + 2]):  # the disk works while this one is packed
            source.prefetch()
        wanted = None
        if isinstance(module, Linear | Embedding):
            is_core = next(iter(group.values())).name.startswith(model.core)
            wanted = module.quantization(quantization if is_core or quantize_towers else None)
        anew += _fill_module(module, group, dtype, device, wanted, in_place=in_place)
        done += sum(source.nbytes for source in _sources([(module, group)]))
        if progress is not None:
            progress(done / total)
    if anew:
        logger.warning("%d layers are stored in a form that no kernel takes (act-order, or 8 bits in groups or with "
                       "zero points): they are kept as int8 with one scale per output", anew)


def _assign(model: Model, tensors: Sequence[Stored]) -> dict[str, _Slot]:
    slots = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            slots[name] = _Slot(name, module, attribute, tuple(parameter.shape), {})
    rename = _renamer(model)
    is_quantised = model.checkpoint.quantization is not None  # some quantisers give every layer a bias
    unexpected = []
    for tensor in tensors:
        target, shard = rename(tensor.key)
        if _is_ignored(tensor.key, model.ignored) or _is_ignored(target, model.ignored):
            continue
        slot = slots.get(model.tied.get(target, target))
        if slot is None or (shard and shard not in slot.shards()):
            if not (is_quantised and tensor.key.endswith(".bias") and _is_zero(tensor)):
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
        raise CheckpointError(f"tensor {tensor.key} in {tensor.file.name} has shape {list(tensor.shape)}, "
                              f"the configuration needs {list(expected)}")
    if isinstance(tensor, StoredTensor) and tensor.dtype not in _FLOATS:
        raise CheckpointError(f"tensor {tensor.key} in {tensor.file.name} is {tensor.dtype}: config.json does not say "
                              "how it is quantised")


def _is_ignored(key: str, patterns: tuple[str, ...]) -> bool:
    return any(key.endswith(p) or key.startswith(p) for p in patterns)


def _renamer(model: Model) -> Callable[[str], tuple[str, str]]:
    """Checkpoint key -> (parameter name, shard or "")."""
    rows = []
    for row in model.weight_map:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^.]+)", re.escape(row.source))
        rows.append((re.compile(pattern), row.target, row.shard or ""))

    def rename(key: str) -> tuple[str, str]:
        for old, new in model.weight_prefixes.items():
            if key.startswith(old):
                key = new + key[len(old):]
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


def _fill_module(module: nn.Module, slots: dict[str, _Slot], dtype: torch.dtype, device: torch.device,
                 wanted: Quantization | None, *, in_place: bool = False) -> bool:
    """Whether codes of the checkpoint had to be quantised anew, though nobody asked for it."""
    if not isinstance(module, Linear | Embedding):
        _fill_parameters(module, slots, dtype, device)
        return False
    weight, is_exact, anew = slots["weight"], False, False
    if wanted is None and module.least_bits <= 8:
        wanted, is_exact = _stored_form(weight)
        anew = wanted is not None and not is_exact
    lying = _lying(weight, dtype, device) if in_place and wanted is None else []
    if wanted is None and isinstance(module, Embedding):
        if len(lying) == 1:
            module.weight = nn.Parameter(lying[0][1], requires_grad=False)
        else:
            _fill_parameters(module, slots, dtype, device)
        return False
    form = module.adopt(lying) if lying and isinstance(module, Linear) else None
    if form is not None:
        _populate(weight)
    elif wanted is not None and is_exact:
        form = module.allocate(dtype, device, wanted)
        _put_codes(cast("QuantizedForm", form), wanted, weight)
    else:
        form = module.allocate(dtype, device, wanted)
        for first, rows in weight.pieces():
            form.fill(first, rows.flatten(1).to(dtype))
    if "bias" in slots:
        form.set_bias(_whole(slots["bias"], dtype, device))
    return anew


def _lying(weight: _Slot, dtype: torch.dtype, device: torch.device) -> list[tuple[int, Tensor]]:
    """(first row, rows) of all parts as they lie in the mapped file, where that is how they are wanted."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return []
    parts = [(first, source) for first, source in weight.parts()
             if isinstance(source, StoredTensor) and source.dtype == dtype and source.populate is not None]
    if len(parts) < len(weight.sources):
        return []
    return [(first, source.view().flatten(1)) for first, source in parts]


def _populate(weight: _Slot) -> None:
    for source in weight.sources.values():
        if isinstance(source, StoredTensor) and source.populate is not None:
            source.populate()


def _stored_form(weight: _Slot) -> tuple[Quantization | None, bool]:
    """The form for a weight all of whose parts are stored as codes, and whether it can hold just these."""
    codes = [source for source in weight.sources.values() if isinstance(source, StoredCodes)]
    if not codes or len(codes) < len(weight.sources):
        return None, False
    forms = {source.form() for source in codes}
    exact = forms.pop() if len(forms) == 1 else None
    return exact or Quantization(8), exact is not None


def _put_codes(form: QuantizedForm, quantization: Quantization, weight: _Slot) -> None:
    parts = [(first, source) for first, source in weight.parts() if isinstance(source, StoredCodes)]
    with_zeros = not all(source.is_symmetric() for _, source in parts)
    for first, source in parts:
        source.put(form, first, quantization, with_zeros=with_zeros)
        source.release()


def _fill_parameters(module: nn.Module, slots: dict[str, _Slot], dtype: torch.dtype, device: torch.device) -> None:
    for name, slot in slots.items():
        setattr(module, name, nn.Parameter(_whole(slot, dtype, device), requires_grad=False))


def _whole(slot: _Slot, dtype: torch.dtype, device: torch.device) -> Tensor:
    value = torch.empty(slot.shape, dtype=dtype, device=device)
    for first, rows in slot.pieces():
        value[first : first + rows.shape[0]].copy_(rows)
    return value


def _read_safetensors(file: Path) -> list[StoredTensor]:
    """Check the header against the file's size, so that no view can reach outside its own bytes."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        header_bytes = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{file.name} is not a safetensors file, or is cut short")
        try:
            header = json.loads(opened.read(header_bytes), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file.name} has a broken safetensors header: {error}") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{file.name} has a broken safetensors header")
        # Private and writable only because torch wants writable memory; nobody writes.
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + header_bytes
    header.pop("__metadata__", None)
    return _check_overlap(file, [_stored(file, memory, start, key, entry) for key, entry in header.items()])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _stored(file: Path, memory: mmap.mmap, start: int, key: str, entry: Any) -> tuple[int, int, StoredTensor]:
    size = len(memory)
    try:
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        sane = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file.name}: the header entry of {key} is broken") from error
    if not sane or end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{file.name}: the header entry of {key} is broken")
    if start + end > size:
        raise CheckpointError(f"{file.name} is cut short: {key} ends at byte {start + end} of {size}")
    first, last = start + begin, start + end

    def view() -> Tensor:
        if first == last:
            return torch.empty(shape, dtype=dtype)
        if first % dtype.itemsize:
            return torch.frombuffer(bytearray(memory[first:last]), dtype=dtype).view(shape)
        return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=first).view(shape)

    def advise(option: int) -> None:
        page = first - first % mmap.PAGESIZE
        if last > first:
            memory.madvise(option, page, last - page)

    def populate() -> None:
        try:
            advise(MADV_POPULATE_READ)
        except OSError:  # a system that does not know it
            advise(mmap.MADV_WILLNEED)

    return begin, end, StoredTensor(key, file, shape, dtype, view, prefetch=lambda: advise(mmap.MADV_WILLNEED),
                                    release=lambda: advise(mmap.MADV_DONTNEED),
                                    populate=None if first % dtype.itemsize else populate)


def _check_overlap(file: Path, tensors: list[tuple[int, int, StoredTensor]]) -> list[StoredTensor]:
    tensors.sort(key=lambda item: item[:2])
    for (_, end, one), (begin, _, other) in itertools.pairwise(tensors):
        if begin < end:
            raise CheckpointError(f"{file.name}: {one.key} and {other.key} overlap")
    return [tensor for _, _, tensor in tensors]


def _read_pickle(file: Path) -> list[StoredTensor]:
    """A torch file, opened by the loader that builds tensors and nothing else."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file.name} holds other things than tensors, or is damaged: not loaded") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{file.name} holds something else than named tensors")
    tensors = []
    while state:
        key = next(iter(state))
        tensors.append(_from_pickle(file, key, state.pop(key)))
    return tensors


def _from_pickle(file: Path, key: str, tensor: Tensor) -> StoredTensor:
    held = [tensor]
    return StoredTensor(key, file, tuple(tensor.shape), tensor.dtype, view=lambda: held[0], prefetch=lambda: None,
                        release=held.clear)
