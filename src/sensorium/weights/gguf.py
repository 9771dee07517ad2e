"""The tensors of GGUF files under the names, and with the contents, that checkpoints have."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sensorium.checkpoint.gguf_file import BlockType, GgufFile, GgufTensor, read_gguf
from sensorium.checkpoint.gguf_metadata import Metadata
from sensorium.checkpoint.gguf_names import (
    CONFIG_TENSORS,
    DENSE_TENSORS,
    GgufArchitecture,
    checkpoint_name,
    gguf_architecture,
    layer_of,
    permuted_heads,
)
from sensorium.checkpoint.gguf_tower_configs import swaps_products, tower_layers
from sensorium.checkpoint.gguf_towers import (
    Change,
    GgufTower,
    frame_of,
    is_tower,
    part_of_name,
    row_of,
    rows_of,
    tower_name,
)
from sensorium.checkpoint.quantization import StoredQuantization
from sensorium.errors import CheckpointError
from sensorium.kernels import BlockWeight, Quantization
from sensorium.kernels.backend import BLOCK_FORMS
from sensorium.kernels.reference.blocks import DECODERS, LINES, are_numbers, half, nibbles
from sensorium.parallel.ranks import Span
from sensorium.weights.decoded_codes import DecodedCodes
from sensorium.weights.stored_codes import PIECE, counted_from_zeros
from sensorium.weights.tensor_files import Runs, StoredTensor, element_of, mapped_tensor

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STORED = StoredQuantization("gguf", ())
_CONVOLUTIONS = ("conv1d.weight", ".conv.conv.weight")  # each channel by itself, over one dimension
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")  # of a tower's linear layers: numbers
_ELSEWHERE = (*CONFIG_TENSORS, *DENSE_TENSORS)
_SCORE = "score.weight"
_ROWS = (
    "shared_expert_gate.weight",
    "token_type_embeddings.weight",
    "classifier.out_proj.weight",
    "classifier.weight",
)  # matrices that may have one row


class BlockCodes(DecodedCodes):
    """A weight in GGUF's blocks, rows uint8 [out, bytes].

    A CPU has them as they are. Elsewhere Q4_0, Q4_1 and Q4_K are int4 in groups of 32, others become int8."""

    kinds: ClassVar = {"blocks": (torch.uint8,)}

    def __init__(self, key: str, rows: StoredTensor, block: BlockType) -> None:
        self.block = block
        super().__init__(key.removesuffix(".weight"), {"blocks": rows}, _STORED)
        self.key, self.becomes_int8 = key, block.name != "MXFP4"
        self.kept_blocks = block.name if block.name in BLOCK_FORMS else None

    def _measure(self, stored: StoredQuantization) -> tuple[tuple[int, int], int, int]:
        out, nbytes = self.parts["blocks"].shape
        return (out, nbytes // self.block.nbytes * self.block.weights), 4, 32

    def decoded(self, rows: slice) -> Tensor:
        return DECODERS[self.block.name](self._blocks(rows)).view(-1, self.shape[1])

    def quantization(self) -> Quantization | None:
        if self.block.name == "MXFP4":
            return Quantization(4, 32, floats=True)
        return Quantization(4, 32) if self.block.name == "Q4_0" or self.block.name in LINES else None

    def put_blocks(self, weight: BlockWeight, span: Span) -> None:
        rows, step = self.parts["blocks"].view()[span.first : span.first + span.rows], max(1, PIECE // self.shape[1])
        for start in range(0, span.rows, step):
            piece = rows[start : start + step]
            self._checked(piece.reshape(-1, self.block.nbytes))
            weight.fill_blocks(span.here + start, piece)

    def mapped(self, span: Span) -> list[Tensor] | None:
        blocks = self.parts["blocks"]
        if blocks.runs is not None and span.rows == self.shape[0]:
            return blocks.runs.rows()
        return None if blocks.populate is None else [blocks.view()[span.first : span.first + span.rows]]

    def populate(self) -> None:
        blocks = self.parts["blocks"]
        populate = blocks.populate if blocks.runs is None else blocks.runs.populate
        if populate is not None:
            populate()

    def codes(self, rows: slice) -> Tensor:
        blocks = self._blocks(rows)
        if self.block.name == "MXFP4":
            return nibbles(blocks[:, 1:]).view(-1, self.shape[1])
        if self.block.name == "Q4_0":
            return nibbles(blocks[:, 2:]).view(-1, self.shape[1])
        codes, scales, offsets = LINES[self.block.name](blocks)
        _, _, is_constant = counted_from_zeros(scales, offsets)
        return codes.view(-1, 32).masked_fill(is_constant.view(-1, 1), 1).view(-1, self.shape[1])

    def scales(self) -> Tensor:
        if self.block.name == "MXFP4":
            return self._powers()
        if self.block.name == "Q4_0":
            return half(self._blocks(slice(None))[:, :2]).view(-1, self.shape[1] // 32).half()
        return self._lines()[0]

    def zeros(self) -> Tensor | None:
        return self._lines()[1] if self.block.name in LINES else None

    def _powers(self) -> Tensor:
        """uint8 [out, groups of 32], exponents of two plus 127"""
        return self._blocks(slice(None))[:, 0].view(self.shape[0], -1)

    def _lines(self) -> tuple[Tensor, Tensor]:
        """Scales and zeros, float16 [out, groups of 32]"""
        found = [counted_from_zeros(*LINES[self.block.name](self._blocks(rows))[1:])[:2] for rows, _ in self._steps()]
        scales, zeros = (torch.cat(one).view(self.shape[0], -1) for one in zip(*found, strict=True))
        return scales, zeros

    def _blocks(self, rows: slice) -> Tensor:
        return self._checked(self.parts["blocks"].view()[rows].reshape(-1, self.block.nbytes))

    def _checked(self, blocks: Tensor) -> Tensor:
        return _with_numbers(blocks, self.block.name, self.key, self.file)


def read_gguf_tensors(parts: Sequence[Path]) -> list[StoredTensor | BlockCodes]:
    """Those of all parts of a model, of which the first has the metadata. What predicts several tokens is left out."""
    files = [read_gguf(part) for part in parts]
    towers = [file for file in files if is_tower(file)]
    meta = Metadata(tuple(file for file in files if file not in towers))
    architecture, layers = gguf_architecture(meta.all), meta.layers
    found: list[StoredTensor | BlockCodes] = []
    for file in meta.files:
        memory = _memory(file)
        for tensor in file.tensors:
            if tensor.name not in _ELSEWHERE and (layer_of(tensor.name) or 0) < layers:
                found += _elements(_changed(_mapped(file, memory, tensor), tensor, meta, architecture), tensor.kind)
    return [*found, *(one for tower in towers for one in read_tower(tower))]


def gguf_numbers(path: Path, name: str) -> Tensor:
    """One tensor of a file, float32. CheckpointError if it is not there."""
    file = read_gguf(path)
    stored = next((tensor for tensor in file.tensors if tensor.name == name), None)
    if stored is None:
        raise CheckpointError(f"{path.name} has no tensor {name}")
    return _numbers(_mapped(file, _memory(file), stored), stored).view().float().clone()


def _with_numbers(blocks: Tensor, kind: str, key: str, file: Path) -> Tensor:
    """The same; CheckpointError where a scale is infinite or no number. Blocks that stay in the file are not looked at:
    a start does not pass through them otherwise."""
    if not are_numbers(kind, blocks):
        raise CheckpointError(f"tensor {key} in {file.name} has a scale that is no number: the file is damaged")
    return blocks


def _numbers(tensor: StoredTensor, stored: GgufTensor) -> StoredTensor:
    """Blocks as the floats that they stand for."""
    kind, shape = stored.kind, stored.shape
    if kind.name in _PLAIN:
        return tensor
    decode = DECODERS[kind.name]
    return replace(
        tensor,
        shape=shape,
        dtype=torch.float32,
        view=lambda: decode(
            _with_numbers(tensor.view().reshape(-1, kind.nbytes), kind.name, tensor.key, tensor.file)
        ).view(shape),
        populate=None,
        cut=None,
    )


def _memory(file: GgufFile) -> mmap.mmap:
    with file.path.open("rb") as opened:
        # Private and writable only because torch wants writable memory; nobody writes.
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)


def read_tower(file: GgufFile) -> Iterator[StoredTensor | BlockCodes]:
    """The tensors of a projector's file, under the names of checkpoints."""
    meta, memory = Metadata((file,)), _memory(file)
    rows, swaps = rows_of(meta), swaps_products(meta)
    tapped = _tapped(meta)
    parts: dict[str, dict[int, StoredTensor]] = {}
    for tensor in file.tensors:
        row = row_of(tensor.name, rows)
        if tensor.name.startswith(row.ignored or "\n"):
            continue
        name, frame = frame_of(_swapped(tensor.name) if swaps else tensor.name)
        key, part = part_of_name(tower_name(name, row, tapped), name)
        mapped = replace(_mapped(file, memory, tensor), key=key)
        if part:
            parts.setdefault(key, {})[int(part)] = _numbers(mapped, tensor)
        elif frame is not None or f"{name}.1" in meta.tensors:
            parts.setdefault(key, {})[frame or 0] = mapped
        else:
            yield _codes(_of_tower(mapped, name, meta, row), tensor.kind)
    yield from (_together(key, found) for key, found in parts.items())


def _tapped(tower: Metadata) -> list[int]:
    """Layers of a tower that sees whose states go to the decoder, too."""
    if not tower.has("vision.is_deepstack_layers"):
        return []
    return [i for i, one in enumerate(tower.flags("vision.is_deepstack_layers", tower_layers(tower)) or []) if one]


def _swapped(name: str) -> str:
    """Of an old file, in which the products of an MLP have each other's names."""
    other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    return ".".join(other.get(one, one) for one in name.split("."))


def _of_tower(tensor: StoredTensor, name: str, meta: Metadata, row: GgufTower) -> StoredTensor:
    if tensor.key.startswith("vision_model.embeddings.") and not tensor.key.endswith((".weight", ".bias")):
        return _reshaped(tensor, (1,) * (3 - len(tensor.shape)) + tensor.shape)
    if row.permutes_heads and name.split(".")[-2] in ("attn_q", "attn_k"):
        return _unpermuted(tensor, meta.get("vision.attention.head_count"))
    if tensor.key.endswith(".bias") and len(tensor.shape) > 1:  # of a convolution
        return _reshaped(tensor, (math.prod(tensor.shape),))
    if tensor.key.endswith(_BOUNDS):
        return _reshaped(tensor, ())
    change = next((one for end, one in row.changes.items() if tensor.key.endswith(end)), None)
    return tensor if change is None else _undone(tensor, change)


def _undone(tensor: StoredTensor, change: Change) -> StoredTensor:
    """As the checkpoint has it."""
    shape = tensor.shape
    if change == "shifted":
        return _with(tensor, lambda rows: rows.float() - 1)
    if change == "softplus":
        return _with(tensor, lambda rows: rows.double().expm1().log())
    if change == "column":
        return _reshaped(tensor, (shape[0], 1, *shape[1:]) if len(shape) == 2 else shape)
    if change == "transposed":
        return replace(_with(tensor, lambda rows: rows.t().contiguous()), shape=shape[::-1])
    if len(shape) != 4:
        return tensor
    flat = (shape[0], math.prod(shape[1:]))
    return replace(_with(tensor, lambda rows: rows.permute(0, 2, 3, 1).reshape(flat)), shape=flat)


def _together(key: str, parts: dict[int, StoredTensor]) -> StoredTensor:
    """A convolution over frames out of one for each frame, [outputs, channels, height, width]; of others, the outputs
    of all parts."""
    first, frames = parts.get(0), [parts[index] for index in sorted(parts)]
    if first is None or len({(one.shape, one.dtype) for one in frames}) > 1 or len(frames) != max(parts) + 1:
        raise CheckpointError(f"{frames[0].file.name}: the parts of {key} do not go together")
    over_frames = len(first.shape) == 4
    shape = (*first.shape[:2], len(frames), *first.shape[2:])
    if not over_frames:
        shape = (len(frames) * first.shape[0], *first.shape[1:])

    def found() -> list[Tensor]:
        return [one.view() for one in frames]

    def release() -> None:
        for one in frames:
            one.release()

    return replace(
        first,
        shape=shape,
        view=lambda: torch.stack(found(), 2) if over_frames else torch.cat(found()),
        release=release,
        populate=None,
        cut=None,
    )


def _mapped(file: GgufFile, memory: mmap.mmap, tensor: GgufTensor) -> StoredTensor:
    """As the file has it; of blocks their bytes, a row of weights a row of bytes."""
    kind, shape = tensor.kind, tensor.shape
    if kind.name in _PLAIN:
        return mapped_tensor(tensor.name, file.path, memory, tensor.offset, shape, _PLAIN[kind.name])
    shape = (*shape[:-1], shape[-1] // kind.weights * kind.nbytes)
    return mapped_tensor(tensor.name, file.path, memory, tensor.offset, shape, torch.uint8)


def _elements(tensor: StoredTensor, kind: BlockType) -> Iterator[StoredTensor | BlockCodes]:
    """The tensor, or each expert's of one that holds those of all."""
    if "{}" not in tensor.key:
        yield _codes(tensor, kind)
        return
    if len(tensor.shape) not in (2, 3):
        raise CheckpointError(f"{tensor.file.name}: {tensor.key.format('N')} is not stored for each expert")
    for index in range(tensor.shape[0]):
        yield _codes(replace(element_of(tensor, index), key=tensor.key.format(index)), kind)


def _codes(tensor: StoredTensor, kind: BlockType) -> StoredTensor | BlockCodes:
    if kind.name in _PLAIN:
        return tensor
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{tensor.file.name}: {tensor.key} is no matrix, but stored as {kind.name}")
    return BlockCodes(tensor.key, tensor, kind)


def _changed(tensor: StoredTensor, stored: GgufTensor, meta: Metadata, architecture: GgufArchitecture) -> StoredTensor:
    """Under its checkpoint's name, with the contents and the shape that it has there."""
    key = checkpoint_name(stored.name, architecture)
    if key == _SCORE:
        return replace(_difference(_numbers(tensor, stored)), key=key)
    tensor = _reshaped(replace(tensor, key=key), _shape(key, tensor.shape))
    which = permuted_heads(stored.name, architecture)
    if which is not None:
        heads = meta.get("attention.head_count")
        count = heads if which == "q" else meta.get("attention.head_count_kv", heads)
        return _paired(tensor, count, meta) if architecture.pairs_heads else _unpermuted(tensor, count)
    if key.endswith("A_log"):
        return _with(tensor, lambda rates: rates.float().neg().log())
    if architecture.norm_offset and key.endswith("norm.weight") and not key.endswith(architecture.plain_norms or "\n"):
        return _with(tensor, lambda rows: rows.float() - architecture.norm_offset)
    return tensor


def _difference(rows: StoredTensor) -> StoredTensor:
    """Of two rows, the score of the first against the second."""
    shape = (1, *rows.shape[1:])
    return replace(_with(rows, lambda two: two[:1].float() - two[1:].float()), shape=shape, dtype=torch.float32)


def _shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What the checkpoint has: llama.cpp drops dimensions of one element that come last in its order."""
    if "{}" in key:
        return shape
    if key.endswith(_CONVOLUTIONS):
        return (shape[0], 1, *shape[1:]) if len(shape) == 2 else shape
    bare = shape[1:] if len(shape) > 1 and set(shape[:-1]) == {1} else shape
    return (1, *bare) if key.endswith(_ROWS) and len(bare) == 1 else bare


def _reshaped(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    if shape == tensor.shape:
        return tensor
    return replace(tensor, shape=shape, view=lambda: tensor.view().view(shape), cut=None)


def _with(tensor: StoredTensor, change: Callable[[Tensor], Tensor]) -> StoredTensor:
    """With other contents than the file has, so that it is no plain mapping of it."""
    return replace(tensor, view=lambda: change(tensor.view()), populate=None, cut=None, runs=None)


def _paired(tensor: StoredTensor, heads: object, meta: Metadata) -> StoredTensor:
    """Of what is rotated of each head, row s * half + i of the file is row 2 i + s; the rows behind it stay."""
    rotated = meta.number("rope.dimension_count")
    size = tensor.shape[0] // heads if isinstance(heads, int) and heads > 0 else 0
    if not isinstance(heads, int) or size * heads != tensor.shape[0] or rotated % 2 or not 0 < rotated <= size:
        raise CheckpointError(
            f"{tensor.file.name}: {tensor.shape[0]} rows are none of {heads} heads, {rotated} rotated"
        )
    order = torch.arange(size)
    order[:rotated] = order[:rotated].view(2, -1).t().flatten()
    return _with(tensor, lambda rows: rows.view(heads, size, *rows.shape[1:])[:, order].reshape(rows.shape))


def _unpermuted(tensor: StoredTensor, heads: object) -> StoredTensor:
    """The rows of each head in halves again: row 2 i + s of the file is row s * half + i."""
    if not isinstance(heads, int) or heads <= 0 or tensor.shape[0] % (2 * heads):
        raise CheckpointError(f"{tensor.file.name}: {tensor.shape[0]} rows do not divide among {heads} heads")

    def halves() -> Tensor:
        return tensor.view().view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2)

    runs = None
    if tensor.populate is not None and len(tensor.shape) == 2:
        runs = Runs(lambda: [rows for head in halves() for rows in head], tensor.populate)
    return replace(_with(tensor, lambda _: halves().reshape(tensor.shape)), runs=runs)
