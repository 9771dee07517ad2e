"""A model's steps on tensors that are not there, for the kernels that they start: all are compiled into Triton's cache.

`python -m sensorium.engine.rehearsal --arch 90 --fd N` is what an engine starts beside itself. Its GPU is not touched,
its weights are not read; what is compiled is exactly what the steps of this checkpoint and these flags start.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from sensorium import kernels
from sensorium.config import EngineConfig
from sensorium.engine.drawing import draws_of
from sensorium.engine.loading import Engine, build_engine, choose_quantization, opened
from sensorium.engine.warming import NOT_CAPTURED
from sensorium.ipc import messages
from sensorium.ipc.messages import FrameReader, Kind, ProtocolError
from sensorium.kernels.gpu import gpu_kernels
from sensorium.models.loading import load_model
from sensorium.types import EngineRequest, Prompt, SamplingParams

GPU = torch.device("cuda", 0)
PROMPTS = (1, 16, 4096)  # tokens, for each size of tiles

logger = logging.getLogger(__name__)


@contextmanager
def absent_gpu() -> Iterator[None]:
    """Tensors that are made here, on any device, have shapes and types but no numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def imagined(config: EngineConfig, dtype: torch.dtype) -> Engine:
    """An engine on a GPU that is not there, in `absent_gpu`. `config.kv_cache_memory` must be given."""
    checkpoint = opened(config)
    quantization = choose_quantization(config, checkpoint.quantization, GPU)
    model = load_model(
        checkpoint, dtype=dtype, device=GPU, quantization=quantization, quantize_towers=config.quantize_towers
    )
    return build_engine(model, checkpoint, config, GPU, dtype, capture=_once)


def rehearse(engine: Engine) -> bool:
    """Start what decodes of all numbers of sequences start, and prompts. False if decodes depend on numbers of the
    device or on lengths of sequences, and so cannot be captured."""
    runner, scheduler = engine.runner, engine.scheduler
    try:
        while runner.can_capture:
            runner.capture_one()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        logger.warning("decodes of this model wait for the device: %s", error)
    longest = engine.ready.max_model_len - 1
    for number, tokens in enumerate(PROMPTS):
        prompt = Prompt(np.zeros(min(tokens, longest), np.int32))
        scheduler.add(EngineRequest(number, prompt, SamplingParams(max_tokens=1)))
        plan, _ = scheduler.schedule()
        with runner.computing(), suppress(DataDependentOutputException, DynamicOutputShapeException):
            runner.launch(plan)
        scheduler.abort(number)
    draws = draws_of([0, 0], [0, 0], [SamplingParams(max_tokens=1)] * 2)
    logits = torch.empty((2, engine.vocab_size), dtype=torch.float32, device=GPU)
    kernels.draw(logits, draws)
    kernels.edit(logits, logits, kernels.Edits.none(*logits.shape))
    return runner.captures_all


def _once(compute: Callable[[], None]) -> Callable[[], None]:
    compute()
    return compute


def compile_for(arch: int, config: EngineConfig, dtype: torch.dtype) -> bool:
    """All kernels of a model for GPUs of this compute capability (90: 9.0) into Triton's cache. Returns whether its
    decodes can be captured."""
    from sensorium.kernels.cuda.compiling import compiling_for

    gpu_kernels().switch()
    with absent_gpu(), compiling_for(arch):
        return rehearse(imagined(config, dtype))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, required=True, help="compute capability: 90 for 9.0")
    parser.add_argument("--dtype", required=True, help="of the weights, as torch calls it")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket with the configuration")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s kernels: %(message)s", stream=sys.stderr)
    with socket.socket(fileno=given.fd) as sock:
        config = _received(sock)
    can_capture = compile_for(given.arch, config, getattr(torch, given.dtype))
    return 0 if can_capture else NOT_CAPTURED


def _received(sock: socket.socket) -> EngineConfig:
    reader = FrameReader()
    while chunk := sock.recv(2**16):
        for kind, payload in reader.feed(chunk):
            if kind == Kind.CONFIG:
                return messages.decode_config(payload)
    raise ProtocolError("the configuration did not come")


if __name__ == "__main__":
    sys.exit(main())
