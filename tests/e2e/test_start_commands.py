"""The start commands of the tutorials that people follow, with `vllm` replaced by `sensorium`, parse."""

from __future__ import annotations

import shlex

import pytest

from sensorium.cli.main import parser, serve_options
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
    "sensorium serve Qwen/Qwen2.5-7B-Instruct --dtype half --max-model-len 32K --tensor-parallel-size 1 "
    "--enforce-eager --gpu-memory-utilization 0.95 --swap-space 4 --block-size 16 --max-num-seqs 256 --seed 0 "
    "--trust-remote-code --enable-chunked-prefill --no-enable-prefix-caching --load-format auto --tokenizer-mode auto "
    "--disable-log-stats --disable-log-requests --distributed-executor-backend mp -tp=1 -pp 1 -O3 --async-scheduling "
    "--uvicorn-log-level warning --generation-config vllm --device cuda --cudagraph-capture-sizes 1 2 4 "
    """--compilation-config '{"level": 3}' --hf-overrides '{"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}' """
    """--override-generation-config '{"temperature": 0.6}' --media-io-kwargs '{"video": {"num_frames": 40}}'""",
    "sensorium serve Qwen/Qwen3-Embedding-0.6B --runner pooling --convert embed --task embedding "
    """--pooler-config '{"task": "embed"}'""",
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
