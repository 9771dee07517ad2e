"""A GGUF model's metadata and tensors, as configs are made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sensorium.checkpoint.gguf_file import GgufFile, GgufTensor, Strings
from sensorium.errors import CheckpointError

MAX_STORED_BYTES = 1 << 16  # of a tensor that is a part of the configuration


@dataclass(frozen=True)
class Metadata:
    """All files of a model, of which the first has the metadata, and those of its keys that begin with the
    architecture's name."""

    files: tuple[GgufFile, ...]

    @property
    def all(self) -> Mapping[str, Any]:
        return self.files[0].metadata

    @property
    def name(self) -> str:
        """Of the file, for errors."""
        return self.files[0].path.name

    @cached_property
    def prefix(self) -> str:
        return str(self.all.get("general.architecture"))

    @cached_property
    def tensors(self) -> dict[str, GgufTensor]:
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}

    def stored(self, key: str, default: Any = None) -> Any:
        """As it stands, be it an array: texts, or numpy's, which is neither true nor false."""
        return self.all.get(f"{self.prefix}.{key}", default)

    def get(self, key: str, default: Any = None) -> Any:
        """One value. CheckpointError if it is an array."""
        return self._one(f"{self.prefix}.{key}", self.stored(key, default))

    def general(self, key: str, default: Any = None) -> Any:
        """The same of keys without the architecture's name."""
        return self._one(key, self.all.get(key, default))

    def _one(self, key: str, value: Any) -> Any:
        if isinstance(value, np.ndarray | Strings):
            raise self.broken(f"{key} must be one value, not an array of {len(value)}")
        return value

    def has(self, key: str) -> bool:
        return self.stored(key) is not None

    def number(self, key: str, default: float | None = None) -> Any:
        """CheckpointError if it is not there, is no finite number, or differs between layers."""
        value = self.stored(key, default)
        if isinstance(value, np.ndarray):
            kinds = set(value.tolist())
            if len(kinds) != 1:
                raise self.broken(f"{self.prefix}.{key} differs between layers: not supported")
            value = kinds.pop()
        return self._finite(key, value)

    def positive(self, key: str, default: float | None = None) -> Any:
        """`number`, by which may be divided."""
        value = self.number(key, default)
        if value <= 0:
            raise self.broken(f"{self.prefix}.{key} must be positive, not {value}")
        return value

    def maybe(self, key: str) -> Any:
        """`number`, or None if it is not there."""
        return self.number(key) if self.has(key) else None

    def numbers(self, key: str, count: int) -> list[Any]:
        """Of each layer, where one number may stand for all."""
        value = self.stored(key)
        found = value.tolist()[:count] if isinstance(value, np.ndarray) else [value] * count
        if len(found) != count:
            raise self.broken(f"{self.prefix}.{key} has {len(found)} numbers for {count} layers")
        return [self._finite(key, one) for one in found]

    def flags(self, key: str, count: int) -> list[bool] | None:
        """Of each layer, if the file says it."""
        value = self.stored(key)
        if not isinstance(value, np.ndarray):
            return None
        if len(value) < count:
            raise self.broken(f"{self.prefix}.{key} has {len(value)} values for {count} layers")
        return [bool(one) for one in value.tolist()[:count]]

    def _finite(self, key: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.broken(f"{self.prefix}.{key} must be a number, not {str(value)[:80]!r}")
        return value

    @property
    def layers(self) -> int:
        """Without those behind the last one that predict several tokens at once."""
        layers = self.number("block_count") - self.number("nextn_predict_layers", 0)
        if (
            not isinstance(layers, int) or layers > len(self.tensors) or layers <= 0
        ):  # before a model of so many layers is built
            raise CheckpointError(f"{self.name} states {layers} layers, but has {len(self.tensors)} tensors")
        return layers

    def stored_numbers(self, name: str) -> list[float]:
        """A small float32 tensor's numbers; [] if there is none."""
        for file in self.files:
            for tensor in file.tensors:
                if tensor.name == name and tensor.kind.name == "F32" and tensor.nbytes <= MAX_STORED_BYTES:
                    with file.path.open("rb") as opened:
                        opened.seek(tensor.offset)
                        return [float(one) for one in np.frombuffer(opened.read(tensor.nbytes), "<f4")]
        return []

    def broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {what}")
