"""A draft model is looked at before anything is loaded: whose tokens it must have, and what it goes with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints
from support.bert import make_colbert

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.cli.main import parser, serve_options
from sensorium.config import EngineConfig
from sensorium.errors import StartupError
from sensorium.startup.drafts import check_vocabulary
from sensorium.startup.fit import engine_plan
from sensorium.startup.model import DEMO_FOLDER, find


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafts")
    checkpoints.make_llama(folder / "model")
    checkpoints.make_llama(folder / "padded", vocab_size=1024, num_hidden_layers=1)
    return folder


def changed(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose tokenizer.json is another one."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    stated = json.loads((target / "tokenizer.json").read_text())
    change(stated)
    (target / "tokenizer.json").write_text(json.dumps(stated))
    return target


def check(draft: Path, model: Path) -> None:
    check_vocabulary("it", open_checkpoint(draft), open_checkpoint(model))


def test_paddings_may_differ_and_one_may_know_more_tokens(folders: Path, tmp_path: Path) -> None:
    def add(stated: dict[str, Any]) -> None:
        last = max(stated["model"]["vocab"].values())
        more = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        stated["added_tokens"].append({"id": last + 1, "content": "<picture>", **more})

    more = changed(folders / "model", tmp_path / "more", add)
    for draft, model in (("padded", "model"), ("model", "padded")):
        check(folders / draft, folders / model)
    check(more, folders / "model")
    check(folders / "model", more)


def test_another_vocabulary_is_told_by_its_sizes_and_first_token(folders: Path, tmp_path: Path) -> None:
    def swap(stated: dict[str, Any]) -> None:
        vocab = stated["model"]["vocab"]
        first, second = (token for token, number in vocab.items() if number in (40, 77))
        vocab[first], vocab[second] = vocab[second], vocab[first]

    other = changed(folders / "model", tmp_path / "other", swap)
    said = r"it: .*of (\d+) tokens where the model has \1: token 40 is '.', the model's is '.'$"
    with pytest.raises(StartupError, match=said):
        check(other, folders / "model")


def test_an_embedding_without_a_row_for_every_token(folders: Path, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow"
    checkpoints.make_llama(narrow, vocab_size=48)
    with pytest.raises(StartupError, match=r"has 48 rows for \d+ tokens, and the model's \d+ tokens go up to number"):
        check(narrow, folders / "model")


def test_what_a_draft_model_does_not_go_with(folders: Path, tmp_path: Path) -> None:
    make_colbert(tmp_path / "bert")
    cases = (
        (("--speculative-tokens", "0"), "padded", "guesses nothing with --speculative-tokens 0"),
        (("--device", "cuda"), "padded", "on a CPU only"),
        (("--tensor-parallel-size", "2"), "padded", "split over devices"),
        ((), "nowhere", "no such folder"),
        ((), str(tmp_path / "bert"), "writes no text"),
    )
    for argv, draft, said in cases:
        words = ["serve", str(folders / "model"), "--draft-model", str(folders / draft), *argv]
        with pytest.raises(StartupError, match=said):
            find(serve_options(parser().read(words), {}), fetch=False)
    words = ["serve", str(tmp_path / "bert"), "--draft-model", str(folders / "model")]
    with pytest.raises(StartupError, match=r"guesses text, and .* writes none"):
        find(serve_options(parser().read(words), {}), fetch=False)


def test_its_folder_and_weights_count(folders: Path) -> None:
    words = ["serve", str(folders / "model"), "--draft-model", str(folders / "padded")]
    found = find(serve_options(parser().read(words), {}), fetch=False)
    assert found.folders == (folders / "model", folders / "padded")
    assert found.options.engine.draft_model == str(folders / "padded")
    engine = EngineConfig("")
    alone, weights = (engine_plan(engine, one, None) for one in (found.checkpoint, found.draft) if one is not None)
    both = engine_plan(engine, found.checkpoint, None, draft=found.draft)
    assert both.weight_bytes == alone.weight_bytes + weights.weight_bytes > alone.weight_bytes


def test_the_built_in_model_guesses_for_itself() -> None:
    words = ["serve", "--draft-model", "sensorium-demo"]
    assert find(serve_options(parser().read(words), {}), fetch=False).folders == (DEMO_FOLDER, DEMO_FOLDER)
