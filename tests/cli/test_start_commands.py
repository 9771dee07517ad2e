"""The start commands of the tutorials that people follow, with `vllm` replaced by `sensorium`, parse."""

from __future__ import annotations

import shlex

import pytest

from sensorium.cli import parser, serve_options
from sensorium.config import ServeOptions

COMMANDS = [
    "sensorium serve llava-hf/llava-1.5-7b-hf --chat-template template_llava.jinja",
    "sensorium serve microsoft/Phi-3.5-vision-instruct --task generate "
    "--trust-remote-code --max-model-len 4096 --limit-mm-per-prompt image=2",
    "sensorium serve fixie-ai/ultravox-v0_5-llama-3_2-1b --max-model-len 4096",
    "sensorium serve /models/Minicpmv2_6 --dtype auto --max-model-len 2048 --api-key token-abc123 "
    "--gpu_memory_utilization 1 --trust-remote-code",
    *(f"sensorium serve jason9693/Qwen2.5-1.5B-apeach --task {t}" for t in ("embed", "classify", "reward", "score")),
    "sensorium serve TIGER-Lab/VLM2Vec-Full --task embed --trust-remote-code",
    "sensorium serve MrLight/dse-qwen2-2b-mrl-v1 --task embed",
    "sensorium serve Qwen/Qwen2-VL-2B-Instruct --port 8001 --host 127.0.0.1 --dtype bfloat16 --max-model-len 4096 "
    """--limit-mm-per-prompt '{"image":2,"video":0}' --mm-processor-kwargs '{"max_pixels":1003520}'""",
]


def read(command: str) -> ServeOptions:
    return serve_options(parser().read(shlex.split(command)[1:]), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_parses(command: str) -> None:
    assert read(command).model == command.split()[2]


def test_means_what_it_says() -> None:
    found = read(COMMANDS[3])
    assert found.engine.gpu_memory_utilization == 1
    assert found.engine.max_model_len == 2048
    assert found.server.api_key == ("token-abc123",)
    assert found.load.trust_remote_code
    assert read(COMMANDS[0]).server.chat_template == "template_llava.jinja"
    assert read(COMMANDS[1]).server.limit_mm_per_prompt == {"image": 2}
    assert read(COMMANDS[4]).load.task == "embed"
