"""The native library on every instruction set that this processor has."""

from __future__ import annotations

import pytest
import torch

from sensorium.kernels.cpu import native
from sensorium.kernels.cpu.library import ISAS, Isa, library_path
from sensorium.kernels.cpu.native import Native


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest) -> Native:
    isa: Isa = request.param
    if library_path() is None:
        pytest.skip("the native library is not built")
    torch.manual_seed(7)
    try:
        return native.load(isa, threads=2)
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture
def fastest() -> Native:
    if library_path() is None:
        pytest.skip("the native library is not built")
    torch.manual_seed(7)
    return native.load()
