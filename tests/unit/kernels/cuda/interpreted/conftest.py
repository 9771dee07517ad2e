"""In every test of this folder: products of bfloat16, the same random numbers, and memory that holds NaN beforehand."""

from __future__ import annotations

import os

import pytest
import torch
from support.triton_interpreter import prepare
from torch import Tensor


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("these tests run with TRITON_INTERPRET=1, see test_interpreted.py")
    prepare(monkeypatch)
    torch.manual_seed(11)
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made = empty(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
