"""What a server of several models is made of: names, folders, and shares of memory."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support import checkpoints
from support.adapters import make_adapter
from support.gguf_writer import tokenizer_metadata, write_gguf

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.cli.main import parser, serve_plan
from sensorium.config import EngineConfig, ServePlan
from sensorium.errors import StartupError
from sensorium.serving.entry import Outline
from sensorium.startup import catalog
from sensorium.startup.catalog import ModelSource, Prepared, prepare
from sensorium.startup.fit import CACHE_PART, ENGINE_BASE_BYTES, LEAST_CACHE_BYTES, budget_of, engine_plan
from sensorium.startup.model import DEMO_FOLDER
from sensorium.units import GiB, MiB


def plan_of(*argv: str) -> ServePlan:
    words = ["serve", *argv]
    return serve_plan(parser().read(words), {}, words)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of models whose engines would be started; none is."""
    names: list[str] = []
    monkeypatch.setattr(ModelSource, "start", lambda source, on_progress: names.append(source.names[0]))
    monkeypatch.setattr(catalog, "free_memory_bytes", lambda: 8 * GiB)
    monkeypatch.setattr(catalog, "gpu_memory_bytes", lambda: None)
    return names


def prepared(*argv: str) -> Prepared:
    return prepare(plan_of(*argv), lambda phase, fraction: None)


def test_the_only_model_stays_and_has_no_budget(made: list[str]) -> None:
    found = prepared()
    assert (found.budget_bytes, found.sources[0].options.load.pinned, made) == (None, True, ["sensorium-demo"])
    assert not prepared("--lazy").sources[0].options.load.pinned
    assert not prepared("--idle-unload-s", "5").sources[0].options.load.pinned
    assert len(made) == 2  # a lazy one is not started


@pytest.mark.parametrize("model", [(), ("sensorium-demo",)])
def test_the_built_in_model_takes_no_projector(model: tuple[str, ...], made: list[str]) -> None:
    with pytest.raises(StartupError, match="--mmproj goes with a GGUF file, and sensorium-demo is none"):
        prepared(*model, "--mmproj", "x.gguf")
    assert not made
    with pytest.raises(StartupError, match="no such folder"):
        prepared("./nowhere")


def test_a_folder_of_models(tmp_path: Path, made: list[str]) -> None:
    checkpoints.make_llama(tmp_path / "org" / "one")
    checkpoints.make_llama(tmp_path / "two")
    (tmp_path / "two" / "1_Pooling").mkdir()
    (tmp_path / "two" / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "no model").mkdir()
    found = prepared("--models-dir", str(tmp_path))
    assert [source.names for source in found.sources] == [("org/one",), ("two",)]
    assert all(source.options.load.lazy and source.outline is not None for source in found.sources)
    assert (found.budget_bytes, made) == (budget_of(8 * GiB), [])
    assert prepared("--models-dir", str(tmp_path), "--memory", "2GiB").budget_bytes == 2 * GiB
    with pytest.raises(StartupError, match="no model to serve"):
        prepared("--models-dir", str(tmp_path / "no model"))
    with pytest.raises(StartupError, match="no such folder"):
        prepared("--models-dir", str(tmp_path / "none"))


def test_ollamas_store(tmp_path: Path, made: list[str]) -> None:
    """Its models by its names, each read from its blob."""
    checkpoints.make_llama(tmp_path / "hub")
    store = tmp_path / "models"
    vocabulary = tokenizer_metadata(tmp_path / "hub", "gpt-2")
    write_gguf(tmp_path / "hub", tmp_path / "m.gguf", "F32", vocabulary, "llama")
    digest = "0123456789abcdef" * 4
    (store / "blobs").mkdir(parents=True)
    (tmp_path / "m.gguf").rename(store / "blobs" / f"sha256-{digest}")
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "1b"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    manifest.write_text(json.dumps({"layers": [layer]}))
    found = prepared("--models-dir", str(store))
    assert [source.names for source in found.sources] == [("tiny:1b",)]
    outline = found.sources[0].outline
    assert found.sources[0].options.load.lazy and outline is not None


def test_two_models_of_one_name(tmp_path: Path, made: list[str]) -> None:
    with pytest.raises(StartupError, match=r"the model .*demo is there twice, .*demo: give each a name"):
        prepared(str(DEMO_FOLDER), str(DEMO_FOLDER))


def test_one_of_several_may_be_wrong(made: list[str]) -> None:
    good, bad = prepared(str(DEMO_FOLDER), "./nowhere").sources
    assert (good.outline is not None, bad.outline, made) == (True, None, [str(DEMO_FOLDER)])


def test_shares_of_memory() -> None:
    checkpoint = open_checkpoint(DEMO_FOLDER)
    engine = EngineConfig(str(DEMO_FOLDER))
    free = engine_plan(engine, checkpoint, None)
    assert (free.engine, free.cache_bytes) == (engine, 0)
    shared = engine_plan(engine, checkpoint, 4 * GiB)
    spare = 4 * GiB - shared.weight_bytes - ENGINE_BASE_BYTES
    assert shared.cache_bytes == shared.engine.kv_cache_memory == spare // 4
    assert shared.engine.encoder_cache_memory is not None
    assert shared.engine_bytes == 4 * GiB - spare + spare // 4 + shared.engine.encoder_cache_memory
    assert engine_plan(engine, checkpoint, 100 * MiB).cache_bytes == LEAST_CACHE_BYTES
    said = engine_plan(replace(engine, kv_cache_memory=MiB), checkpoint, 4 * GiB)
    assert (said.cache_bytes, said.engine.kv_cache_memory) == (MiB, MiB)
    small = engine_plan(replace(engine, quantization="int8"), checkpoint, 4 * GiB)
    assert small.weight_bytes < shared.weight_bytes


def test_adapters_take_of_the_budget(tmp_path: Path, made: list[str]) -> None:
    checkpoints.make_llama(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base")
    size = (adapter / "adapter_model.safetensors").stat().st_size
    words = (str(tmp_path / "base"), "--memory", "2GiB")

    def outline(*more: str) -> Outline:
        found = prepared(*words, *more).sources[0].outline
        assert found is not None
        return found

    plain, adapted = outline(), outline("--lora", f"a={adapter}", "b=some/repository")
    assert adapted.weight_bytes == plain.weight_bytes
    assert 0 <= plain.cache_bytes - adapted.cache_bytes - size // CACHE_PART <= 1


async def test_a_model_that_is_unloaded_is_gone_though_its_parts_know_each_other(
    made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        def __init__(self) -> None:
            self.whole = self

    @asynccontextmanager
    async def opened(starting: object, loader: object, nursery: object) -> AsyncIterator[Model]:
        yield Model()

    monkeypatch.setattr(catalog, "opened", opened)
    (source,) = prepared("--lazy").sources
    source.loader = None  # type: ignore[assignment]
    gc.disable()
    try:
        async with source.open(lambda phase, fraction: None) as model:
            found = weakref.ref(model)
            del model
        assert found() is None
    finally:
        gc.enable()
