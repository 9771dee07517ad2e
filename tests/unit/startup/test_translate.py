"""What flags mean together: one task of four ways to say it, videos' frames, sampling defaults, config.json's edits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensorium.checkpoint.configs import Checkpoint, open_checkpoint
from sensorium.cli.main import parser, serve_options
from sensorium.config import ServerConfig
from sensorium.errors import StartupError
from sensorium.startup.model import DEMO_FOLDER
from sensorium.startup.translate import as_meant, with_sampling_defaults
from sensorium.types import Modality


def task(*argv: str) -> str:
    return as_meant(serve_options(parser().read(["serve", "m", *argv]), {}), DEMO_FOLDER, ()).load.task


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        ([], "auto"),
        (["--runner", "generate"], "generate"),
        (["--runner", "pooling"], "pooling"),
        (["--convert", "embed"], "embed"),
        (["--runner", "pooling", "--convert", "classify"], "classify"),
        (["--runner", "auto", "--convert", "none"], "auto"),
        (["--task", "embed", "--runner", "pooling"], "embed"),
        (["--task", "embedding", "--convert", "embed"], "embed"),
        (["--pooler-config", '{"task": "token_classify"}', "--runner", "pooling"], "reward"),
        (["--pooler-config", '{"task": null}'], "auto"),
        (["--task", "pooling"], "pooling"),
    ],
)
def test_what_is_served_may_be_said_in_four_ways(argv: list[str], meant: str) -> None:
    assert task(*argv) == meant


@pytest.mark.parametrize(
    "argv",
    [
        ["--runner", "generate", "--convert", "embed"],
        ["--task", "generate", "--runner", "pooling"],
        ["--task", "embed", "--convert", "classify"],
        ["--task", "embed", "--pooler-config", '{"task": "classify"}'],
    ],
)
def test_but_not_in_two_at_once(argv: list[str]) -> None:
    with pytest.raises(StartupError, match="contradict"):
        task(*argv)


@pytest.mark.parametrize(
    "pooler",
    [
        {"task": "plugin"},
        {"step_tag_id": 5},
        {"enable_chunked_processing": 1},
        {"max_embed_len": 1000},
        {"max_embed_len": -1, "enable_chunked_processing": True},
        {"pooling_type": "STEP"},
        {"pooling_type": 5},
        {"dimensions": 5},
    ],
)
def test_what_a_pooler_cannot_be_told(pooler: dict[str, Any]) -> None:
    with pytest.raises(StartupError, match="--pooler-config: " + next(iter(pooler))):
        task("--pooler-config", json.dumps(pooler))


def pooling(folder: Path, pooler: dict[str, Any], *argv: str) -> str:
    argv = ("serve", "m", "--pooler-config", json.dumps(pooler), *argv)
    return as_meant(serve_options(parser().read(argv), {}), folder, ()).engine.pooling


def test_a_pooler_s_pooling_is_the_flag_s(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Transformer"}]))
    assert pooling(DEMO_FOLDER, {"pooling_type": "MEAN", "normalize": True}) == "mean"
    assert pooling(DEMO_FOLDER, {"seq_pooling_type": "cls", "tok_pooling_type": "ALL", "use_activation": True}) == "cls"
    assert pooling(tmp_path, {"pooling_type": "LAST", "normalize": False}, "--pooling", "last-token") == "last"
    assert pooling(DEMO_FOLDER, {"task": "embed", "enable_chunked_processing": False}, "--pooling", "max") == "max"
    for folder, pooler in ((DEMO_FOLDER, {"normalize": False}), (tmp_path, {"use_activation": True})):
        with pytest.raises(StartupError, match="requests say it"):
            pooling(folder, pooler)
    with pytest.raises(StartupError, match="contradicts --pooling mean"):
        pooling(DEMO_FOLDER, {"pooling_type": "CLS"}, "--pooling", "mean")


def test_a_pooler_s_chunks_are_the_flag_s() -> None:
    def server(pooler: dict[str, Any], *argv: str) -> tuple[bool, int | None]:
        argv = ("serve", "m", "--pooler-config", json.dumps(pooler), *argv)
        found = as_meant(serve_options(parser().read(argv), {}), DEMO_FOLDER, ()).server
        return found.embed_in_chunks, found.max_embed_len

    assert server({}) == (False, None)
    assert server({"enable_chunked_processing": True}) == (True, None)
    assert server({"enable_chunked_processing": True, "max_embed_len": 3_072_000}) == (True, 3_072_000)
    assert server({}, "--embed-in-chunks", "--max-embed-len", "64K") == (True, 65536)


def settings(
    media: dict[str, Any],
    processor: dict[str, Any] | None = None,
    modalities: tuple[Modality, ...] = ("image", "video"),
) -> dict[str, Any]:
    argv = ["serve", "m", "--media-io-kwargs", json.dumps(media), "--mm-processor-kwargs", json.dumps(processor or {})]
    return as_meant(serve_options(parser().read(argv), {}), DEMO_FOLDER, modalities).server.mm_processor_kwargs


def test_frames_of_videos_are_the_processor_s() -> None:
    assert settings({"video": {"num_frames": 40}}) == {"num_frames": 40}
    assert settings({"video": {"fps": 1}, "image": {"image_mode": "RGB"}}, {"max_pixels": 5}) == {
        "max_pixels": 5,
        "fps": 1,
    }
    assert settings({"video": {"num_frames": 40, "video_backend": "opencv"}, "audio": {}}, {"num_frames": 40}) == {
        "num_frames": 40
    }
    assert settings({"video": {"num_frames": 40}}, modalities=("image",)) == {}  # as vLLM: nothing to read that way


@pytest.mark.parametrize(
    ("media", "words"),
    [
        ({"smell": {}}, "settings by kind"),
        ({"video": 5}, "settings by kind"),
        ({"num_frames": 5}, "settings by kind"),
        ({"image": {"num_frames": 5}}, "image.num_frames"),
        ({"image": {"image_mode": "L"}}, "image.image_mode"),
        ({"video": {"num_frames": 5}}, "both say num_frames"),
    ],
)
def test_other_settings_of_media_are_refused(media: dict[str, Any], words: str) -> None:
    with pytest.raises(StartupError, match=words):
        settings(media, {"num_frames": 6})


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return open_checkpoint(DEMO_FOLDER)


def test_sampling_defaults(demo: Checkpoint, tmp_path: Path) -> None:
    def generation(**flags: Any) -> dict[str, Any]:
        return with_sampling_defaults(checkpoint, ServerConfig(**flags)).generation

    checkpoint = replace(demo, generation={"temperature": 0.2, "top_k": 20, "eos_token_id": 3})
    assert generation() == checkpoint.generation
    assert generation(generation_config="vllm") == {"eos_token_id": 3}
    assert generation(override_generation_config={"temperature": 0.6}) == {**checkpoint.generation, "temperature": 0.6}
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.5, "eos_token_id": 9}))
    assert generation(generation_config=str(tmp_path)) == {"eos_token_id": 3, "top_p": 0.5}
    for bad in ({"max_new_tokens": 5}, {"temperature": "hot"}, {"temperature": True}):
        with pytest.raises(StartupError, match=next(iter(bad))):
            generation(override_generation_config=bad)
    with pytest.raises(StartupError, match=r"generation_config\.json"):
        generation(generation_config=str(tmp_path / "none"))


def test_guessed_tokens_in_vllm_s_words() -> None:
    def guesses(config: dict[str, Any], *argv: str) -> tuple[str | None, int]:
        argv = ("serve", "m", "--speculative-config", json.dumps(config), *argv)
        found = as_meant(serve_options(parser().read(argv), {}), DEMO_FOLDER, ())
        return found.load.draft_model, found.engine.speculative_tokens

    assert guesses({}) == (None, 16)
    assert guesses({}, "--draft-model", "tiny/draft") == ("tiny/draft", 16)
    assert guesses({"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}) == (None, 5)
    assert guesses({"model": "[ngram]"}, "--num-speculative-tokens", "0") == (None, 0)
    assert guesses({"model": "tiny/draft", "num_speculative_tokens": 4}) == ("tiny/draft", 4)
    assert guesses({"method": "draft_model", "model": "tiny/draft"}, "-md", "tiny/draft") == ("tiny/draft", 16)
    for config, said in (
        ({"method": "eagle3"}, "eagle3 is not offered"),
        ({"method": "eagle", "model": "tiny/head"}, "tiny/head is not offered"),
        ({"method": "draft_model"}, "draft_model is not offered"),
        ({"method": "ngram", "num_speculative_tokens": 900}, "from 0 to 64"),
        ({"method": "ngram", "tree": 1}, "tree is not known"),
    ):
        with pytest.raises(StartupError, match=said):
            guesses(config)
    with pytest.raises(StartupError, match="names the model a, and --draft-model b"):
        guesses({"model": "a"}, "--draft-model", "b")
