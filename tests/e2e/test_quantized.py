"""Quantised models through the whole program, with the native build and from a package that has none."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import server
from support.checkpoints import make_llama, make_qwen2_vl
from support.live import live
from support.model_driver import clear_answers
from support.quantized_checkpoints import write_gptq

import sensorium
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.kernels import Quantization
from sensorium.kernels.cpu.library import library_path
from sensorium.models.loading import load_model

SOURCE = Path(sensorium.__file__).parent
# Flags, what the loader makes of them, and what the log says of the weights without native code.
MODES: dict[str, tuple[list[str], Quantization | None]] = {
    "auto": ([], None),
    "int8": (["--quantization", "int8"], Quantization(8)),
    "int4": (
        ["--quantization", "int4", "--quantization-group-size", "32", "--kv-cache-dtype", "int8"],
        Quantization(4, 32),
    ),
    "gptq": (["--quantization", "gptq"], None),
}


@pytest.fixture(scope="module")
def plain_package(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a program whose package was installed without a compiler."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(SOURCE, folder / "sensorium", ignore=shutil.ignore_patterns("_native*", "__pycache__"))
    environment = {"PYTHONPATH": str(folder)}
    code = "import sensorium.kernels as k; print(k.__file__, k.describe())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"{folder / 'sensorium/kernels/__init__.py'} torch reference kernels\n"
    return environment


@pytest.mark.parametrize("mode", MODES)
def test_the_same_answers_without_the_native_build(tmp_path: Path, mode: str, plain_package: dict[str, str]) -> None:
    flags, quantization = MODES[mode]
    folder = tmp_path / "model"
    make_llama(folder, hidden_size=64, dtype="bfloat16")
    if mode == "gptq":
        write_gptq(folder)
    model = load_model(open_checkpoint(folder), dtype=torch.bfloat16, device="cpu", quantization=quantization)
    prompts = [
        prompt for prompt, _ in clear_answers(model, 3, 8, dtype=torch.bfloat16, int8_cache="--kv-cache-dtype" in flags)
    ]
    said, answers = [], []
    for environment in (None, plain_package):
        with live(tmp_path, str(folder), *flags, warm=False, environment=environment) as found:
            replies = [found.complete(prompt, max_tokens=8, ignore_eos=True) for prompt in prompts]
            answers.append([reply.json()["choices"][0]["text"] for reply in replies])
            said.append(found.server.text())
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 3
    is_slow = [library_path() is None, True]
    for text, slow in zip(said, is_slow, strict=True):
        assert text.count("native kernels cannot be used") == slow
        assert text.count("quantised weights of bfloat16 on cpu are computed with torch alone") == (
            slow and mode != "auto"
        )


def size_of(log: str, what: str) -> tuple[float, str, int]:
    """(size, its unit, tokens) of the log's last line."""
    found = re.search(rf"{what} ([\d.]+) (\w+)(?: \((\d+) tokens\))?", log)
    assert found is not None, log
    return float(found[1]), found[2], int(found[3] or 0)


def test_what_flags_save(tmp_path: Path) -> None:
    """A tower that is quantised too, and a cache whose blocks are bytes."""
    folder = tmp_path / "model"
    make_qwen2_vl(
        folder,
        dtype="bfloat16",
        vision={"embed_dim": 128, "num_heads": 4},
        text={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        },
    )
    weights, tokens = [], []
    for flags in (
        [],
        ["--quantization", "int8"],
        ["--quantization", "int8", "--quantize-towers", "--kv-cache-dtype", "int8"],
    ):
        with live(tmp_path, str(folder), *flags, kv_cache_memory="256KiB") as found:
            weights.append(size_of(found.server.text(), "weights"))
            tokens.append(size_of(found.server.text(), "KV cache")[2])
    assert {unit for _, unit, _ in weights} <= {"kB", "MB"}
    sizes = [size * (1000 if unit == "MB" else 1) for size, unit, _ in weights]
    assert sizes[0] > sizes[1] * 1.2 > sizes[2] * 1.4
    assert tokens == [256, 256, 256 * 1024 // (2 * 2 * 2 * 16 * 68) * 16]


def test_a_method_that_the_checkpoint_does_not_have(tmp_path: Path) -> None:
    make_llama(tmp_path / "model")
    process = server.start(tmp_path / "log", str(tmp_path / "model"), "--quantization", "awq", "--port", "0")
    assert process.wait(60) == 2
    assert (
        (tmp_path / "log")
        .read_text()
        .splitlines()[-1]
        .startswith("sensorium: --quantization awq: the checkpoint's weights are stored as plain numbers")
    )
