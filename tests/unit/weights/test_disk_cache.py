"""Quantised weights on disk: the next start computes the same and quantises nothing; damage costs one start."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_llama, make_qwen2_vl
from support.engine_harness import Outbox
from support.model_driver import Driver, Sequence
from torch import Tensor

from sensorium import kernels
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.config import EngineConfig
from sensorium.engine import loading
from sensorium.engine.faults import Faults
from sensorium.engine.loading import load_engine, mapped_weight_bytes
from sensorium.engine.loop import Core
from sensorium.kernels import Quantization
from sensorium.kernels.cpu import library, linear
from sensorium.models.base import Model
from sensorium.models.loading import load_model
from sensorium.weights.disk_cache import QuantizedCopy

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the native library is not built")
BF16 = torch.bfloat16
INT8, INT4 = Quantization(8), Quantization(4, 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    make_llama(made)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "quantized"


def copy_of(folder: Path, cache: Path, quantization: Quantization) -> QuantizedCopy:
    return QuantizedCopy(cache, open_checkpoint(folder).weight_files, [quantization])


def load(
    folder: Path, quantization: Quantization, copy: QuantizedCopy | None = None, *, quantize_towers: bool = False
) -> Model:
    return load_model(
        open_checkpoint(folder),
        dtype=BF16,
        device="cpu",
        quantization=quantization,
        copy=copy,
        quantize_towers=quantize_towers,
    )


def logits(model: Model) -> Tensor:
    return Driver(model, dtype=BF16).prefill(Sequence([5, 300, 7, 42, 11]))


def written(copy: QuantizedCopy) -> Path:
    for _ in copy.write():
        pass
    until(copy.file.is_file)
    return copy.file


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def keep(folder: Path, cache: Path, quantization: Quantization) -> Path:
    copy = copy_of(folder, cache, quantization)
    load(folder, quantization, copy)
    assert not copy.is_whole
    return written(copy)


def refuse(*_: object) -> None:
    raise AssertionError("quantised again")


@pytest.mark.parametrize("quantization", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("make", [make_llama, make_qwen2_vl])
def test_the_next_start_computes_the_same_and_quantises_nothing(
    tmp_path: Path,
    cache: Path,
    make: Callable[..., object],
    quantization: Quantization,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(tmp_path)
    first = copy_of(tmp_path, cache, quantization)
    expected = logits(load(tmp_path, quantization, first, quantize_towers=True))
    written(first)

    monkeypatch.setattr(linear.QuantizedLinear, "fill", refuse)
    second = copy_of(tmp_path, cache, quantization)
    model = load(tmp_path, quantization, second, quantize_towers=True)
    assert second.is_whole
    assert second.is_empty
    assert mapped_weight_bytes(model) > 0
    assert torch.equal(logits(model), expected)
    second.file.unlink()  # whoever has it mapped keeps it
    assert torch.equal(logits(model), expected)


def test_every_way_of_quantising_has_its_own(folder: Path, cache: Path) -> None:
    kept = {keep(folder, cache, one) for one in (INT8, INT4, replace(INT4, group=64))}
    assert len(kept) == len(list(cache.iterdir())) == 3
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in kept)
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_changed_checkpoint_is_quantised_anew_and_its_old_copy_goes(folder: Path, cache: Path) -> None:
    old = keep(folder, cache, INT4)
    weights = open_checkpoint(folder).weight_files[0]
    os.utime(weights, ns=(1, 1))
    new = keep(folder, cache, INT4)
    assert new != old
    until(lambda: not old.exists())
    assert list(cache.iterdir()) == [new]


@pytest.mark.parametrize("of_folder", [False, True])
def test_what_others_may_write_to_is_not_used(folder: Path, cache: Path, of_folder: bool) -> None:
    file = keep(folder, cache, INT4)
    (cache if of_folder else file).chmod(0o777)
    copy = copy_of(folder, cache, INT4)
    assert copy.is_empty
    load(folder, INT4, copy)
    before = file.read_bytes()
    for _ in copy.write():
        pass
    if of_folder:
        assert list(cache.iterdir()) == [file]  # nothing is put there
        assert file.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "head", "foreign"])
def test_a_damaged_copy_costs_one_start(
    folder: Path, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(load(folder, INT4))
    file = keep(folder, cache, INT4)
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "head":
        file.write_bytes(b"\xff" * 64 + content[64:])
    else:  # another way of quantising under this name
        file.write_bytes(keep(folder, cache, INT8).read_bytes())
    copy = copy_of(folder, cache, INT4)
    assert torch.equal(logits(load(folder, INT4, copy)), expected)
    assert "copy of the quantised weights" in caplog.text
    if damage == "foreign":
        assert not file.exists()
    keep_again = copy_of(folder, cache, INT4)
    load(folder, INT4, keep_again)
    written(keep_again)
    assert torch.equal(logits(load(folder, INT4, copy_of(folder, cache, INT4))), expected)


def test_a_folder_that_cannot_be_made_costs_only_the_copy(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    copy = copy_of(folder, tmp_path / "file" / "cache", INT4)
    load(folder, INT4, copy)
    assert list(copy.write()) == []
    assert "are not kept" in caplog.text


def test_a_disk_that_is_full_costs_only_the_copy(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copy_of(folder, cache, INT4)
    load(folder, INT4, copy)
    monkeypatch.setattr("sensorium.weights.disk_cache.shutil.disk_usage", lambda _: _Usage())
    assert list(copy.write()) == []
    assert list(cache.iterdir()) == []


class _Usage:
    free = 1000


def test_a_copy_given_up_half_way_leaves_nothing(folder: Path, cache: Path) -> None:
    copy = copy_of(folder, cache, INT4)
    load(folder, INT4, copy)
    writing: Any = copy.write()
    next(writing)
    assert len(list(cache.iterdir())) == 1
    writing.close()
    assert list(cache.iterdir()) == []


def test_an_idle_engine_keeps_its_copy(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(
        str(folder), dtype="bfloat16", quantization="int4", kv_cache_memory=1 << 20, quantized_cache=str(cache)
    )
    assert not load_engine(config).has_idle_work  # too small for that to pay
    monkeypatch.setattr(loading, "MAPPED_BYTES", 0)
    assert not load_engine(replace(config, quantized_cache="")).has_idle_work
    engine = load_engine(config)
    core = Core(engine, Outbox(), Faults())
    while engine.has_idle_work:
        core.turn()
    until(lambda: any(cache.glob("*.weights")))
    monkeypatch.setattr(linear.QuantizedLinear, "fill", refuse)
    assert not load_engine(config).has_idle_work


def test_without_kernels_nothing_is_kept(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "MAPPED_BYTES", 0)
    monkeypatch.setattr(kernels, "_native", lambda: None)
    config = EngineConfig(
        str(folder), dtype="bfloat16", quantization="int4", kv_cache_memory=1 << 20, quantized_cache=str(cache)
    )
    assert not load_engine(config).has_idle_work
    assert not cache.exists()
