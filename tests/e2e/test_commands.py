"""What models take, told before they are loaded; which there are; and what completes their names and flags."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.cli import models
from sensorium.cli.completion import script
from sensorium.cli.info import rows_of
from sensorium.cli.main import main, parser
from sensorium.models.cache import PagedGroup
from sensorium.models.loading import load_model
from sensorium.units import MiB


@pytest.mark.parametrize(
    "make",
    [
        checkpoints.make_llama,
        checkpoints.make_qwen3,
        checkpoints.make_gemma4_text,
        checkpoints.make_lfm2,
        checkpoints.make_qwen3_5_text,
    ],
)
def test_cache_of_a_token_is_what_the_layers_keep(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    groups = load_model(checkpoint, dtype=torch.float32, device="cpu").cache_groups()
    for dtype, name in ((torch.float32, "auto"), (torch.int8, "int8")):
        expected = sum(group.token_bytes(dtype) for group in groups if isinstance(group, PagedGroup))
        assert models.cache_bytes_per_token(checkpoint, name) == expected > 0


def test_info_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.make_qwen2(tmp_path / "model")
    found = dict(rows_of(str(tmp_path / "model")))
    assert found["model"] == "Qwen2, Qwen2.5 (Qwen2ForCausalLM)"
    assert found["takes"] == "text"
    assert "generate text" in found["can"]
    assert found["can"].endswith("; embed (/v1/embeddings)")
    checkpoints.make_qwen2(tmp_path / "Qwen3-Embedding")
    assert dict(rows_of(str(tmp_path / "Qwen3-Embedding")))["can"].endswith("; embed (/v1/embeddings, /score, /rerank)")
    assert found["context"] == "512 tokens"
    checkpoint = open_checkpoint(tmp_path / "model")
    told = dict(models.memory_rows(checkpoint, 1000 * MiB))
    assert list(told) == ["KV cache", "free memory", "  as stored", "  int8", "  int4", "  2 devices", "  4 devices"]
    assert told["  2 devices"].endswith("and 128 bytes of KV cache a token on each")
    assert "fits here, with 32768 tokens of KV cache and prompts of up to 512" in told["  int8"]
    assert "does not fit here" in dict(models.memory_rows(checkpoint, 330 * MiB))["  as stored"]
    checkpoints.make_qwen2(tmp_path / "draft", num_hidden_layers=1)
    draft = open_checkpoint(tmp_path / "draft")
    both = dict(models.memory_rows(checkpoint, 1000 * MiB, draft))
    alone, guessing = (models.cache_bytes_per_token(one, "auto") for one in (checkpoint, draft))
    assert both["KV cache"].startswith(f"{alone + guessing} bytes a token")
    assert main(["info", str(tmp_path / "model"), "--draft-model", str(tmp_path / "draft")]) == 0
    assert "draft model      Qwen2, Qwen2.5, 512 tokens" in capsys.readouterr().out
    assert main(["info", "--draft-model", "demo"]) == 2
    assert main(["info", str(tmp_path / "model"), "--draft-model", "demo"]) == 2
    assert "its vocabulary is another one" in capsys.readouterr().err
    for bad, line in (("nowhere/at-all", "not downloaded yet"), (str(tmp_path), "no config.json")):
        assert main(["info", bad]) == 2
        assert line in capsys.readouterr().err
    assert main(["info", "demo"]) == 0
    assert "text, audio, image, video" in capsys.readouterr().out


def test_list_tells_what_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.make_llama(tmp_path / "here" / "good")
    (tmp_path / "here" / "other").mkdir()
    (tmp_path / "here" / "other" / "config.json").write_text(json.dumps({"architectures": ["Else"]}))
    assert main(["list", "--models-dir", str(tmp_path / "here")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["MODEL", "good", "other"]
    assert "Llama" in lines[1]
    assert lines[2].endswith("Else: not served")
    hub = tmp_path / "hub" / "models--some--model"
    (hub / "snapshots").mkdir(parents=True)
    (tmp_path / "here" / "good").rename(hub / "snapshots" / ("a" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    assert main(["list", "--download-dir", str(tmp_path / "hub")]) == 0
    assert "some/model" in capsys.readouterr().out
    assert main(["list", "--download-dir", str(tmp_path / "none")]) == 0
    assert "no models are here" in capsys.readouterr().out
    assert (
        main(["pull", "some/model", "--download-dir", str(tmp_path / "hub")]) == 0
    )  # it is whole: the hub is not asked
    assert capsys.readouterr().out.strip() == str(hub / "snapshots" / ("a" * 40))


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("ser", "serve"),
        ("serve --max-num-s", "--max-num-seqs"),
        ("serve m --kv-cache-dtype i", "int8"),
        ("bench th", "throughput"),
        ("bench serve --kind rer", "rerank"),
        ("completion z", "zsh"),
        ("stop --a", "--all"),
    ],
)
def test_bash_completes(typed: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script("bash", parser()))
    words = ["sensorium", *typed.split()]
    command = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _sensorium; echo "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", command, str(tmp_path / "script"), *words], capture_output=True, text=True, check=False
    )
    assert (done.stdout.split(), done.stderr) == ([expected], "")


def test_other_shells_get_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef sensorium\n")
    lines = script("fish", parser()).splitlines()
    for word in ("serve", "run-batch", "bench", "chat", "info", "list", "pull", "ps", "stop", "completion"):
        assert any(f" -a '{word}' " in line for line in lines), word
    (rate,) = [line for line in lines if " -l rate " in line]
    assert "'__fish_seen_subcommand_from bench; and __fish_seen_subcommand_from serve'" in rate
    assert not [line for line in lines if "\n" in line or line.count("'") % 2]


def test_throughput_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The built-in model; the same way measures latency."""
    file = tmp_path / "figures.json"
    words = ["--requests", "12", "--input-tokens", "8", "--output-tokens", "5", "--json", str(file)]
    assert main(["bench", "throughput", *words, "--kv-cache-memory", "32MiB", "--threads", "1"]) == 0
    assert "12 requests in" in capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert figures["errors"] == {}
    assert figures["output_tokens_per_s"] == pytest.approx(60 / figures["wall_s"], rel=0.01)
