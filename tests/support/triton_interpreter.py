"""Triton's interpreter as the tests of kernels use it: products of bfloat16, and what is close enough."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of values around 1. The interpreter cuts off what bfloat16 cannot hold, torch rounds it."""


def prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as bit patterns and would multiply these: make them float32 for a product. And it
    puts its language in place at every call of a function, which takes most of its time: do so once for a module."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle, _patch_lang

    narrow = InterpreterBuilder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return narrow(self, wide(a), wide(b), *rest)

    patched: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            _patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpretedFunction, "__call__", call)


def assert_close(got: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """In the tolerance of the first one's type, `factor` times; never where one of them is no number."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    within = factor * TOLERANCES[got.dtype]
    torch.testing.assert_close(got.float(), expected.float(), atol=within, rtol=within)
