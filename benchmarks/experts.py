"""How near to memory's speed a mixture of experts decodes: `python benchmarks/experts.py FOLDER [--quantization int4]`.

Layers of Qwen3-30B-A3B's shape with a small vocabulary, random weights; FOLDER keeps the checkpoint for the next run. A
step must read attention, routers, the head and the experts that its token takes. Every round times plain reading of a
gigabyte, with as many threads, before and after its steps: the share is of the faster one. On a busy machine one thread
with --cpu-time says more: waiting for the processor is then no part of either.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from engine import Bench
from safetensors.torch import save_file

from sensorium.models.experts import RoutedMLP
from sensorium.models.layers import Linear

HIDDEN, INNER, EXPERTS, PER_TOKEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 768, 128, 8, 32, 4, 128, 2048
READ_BYTES = 1 << 30


def write(folder: Path, layers: int) -> None:
    """The checkpoint; all layers have the same numbers."""
    folder.mkdir(parents=True)

    def noise(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5)

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    layer = {
        **{"input_layernorm.weight": ones, "post_attention_layernorm.weight": ones.clone()},
        **{f"self_attn.{name}_norm.weight": ones[:HEAD_DIM].clone() for name in "qk"},
        "self_attn.q_proj.weight": noise(HEADS * HEAD_DIM, HIDDEN),
        **{f"self_attn.{name}_proj.weight": noise(KV_HEADS * HEAD_DIM, HIDDEN) for name in "kv"},
        "self_attn.o_proj.weight": noise(HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate.weight": noise(EXPERTS, HIDDEN),
        "mlp.experts.gate_up_proj": noise(EXPERTS, 2 * INNER, HIDDEN),
        "mlp.experts.down_proj": noise(EXPERTS, HIDDEN, INNER),
    }
    outside = {"model.embed_tokens.weight": noise(VOCAB, HIDDEN), "lm_head.weight": noise(VOCAB, HIDDEN)}
    parts = [{f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()} for i in range(layers)]
    files = {}
    for index, part in enumerate([{**outside, "model.norm.weight": ones.clone()}, *parts]):
        files |= dict.fromkeys(part, f"model-{index}.safetensors")
        save_file(part, folder / f"model-{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = {
        **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16"},
        **{"hidden_size": HIDDEN, "intermediate_size": 6144, "moe_intermediate_size": INNER, "num_experts": EXPERTS},
        **{"num_experts_per_tok": PER_TOKEN, "norm_topk_prob": True, "num_hidden_layers": layers, "head_dim": HEAD_DIM},
        **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB},
        **{"max_position_embeddings": 4096, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
    }
    (folder / "config.json").write_text(json.dumps(config))


def step_bytes(bench: Bench) -> int:
    """Of weights that one token needs."""
    model = bench.model
    packed = sum(module.packed.nbytes for module in model.modules() if isinstance(module, Linear))
    for module in model.modules():
        if isinstance(module, RoutedMLP):
            experts = sum(linear.packed.nbytes for linear in module.experts.modules() if isinstance(linear, Linear))
            packed -= experts * (EXPERTS - PER_TOKEN) // EXPERTS
    return packed


def read_speed(memory: torch.Tensor, clock: Callable[[], float]) -> float:
    """Bytes a second."""
    start = clock()
    memory.sum()
    return memory.nbytes / (clock() - start)


def step_seconds(bench: Bench, steps: int, clock: Callable[[], float]) -> float:
    bench.start(1, 64, steps + 8)
    bench.decode(2)
    start = clock()
    bench.decode(steps)
    seconds = (clock() - start) / steps
    bench.finish()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=3, help="of a checkpoint that is written anew; 1.25 GB each")
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--cpu-time", action="store_true", help="of the one thread that computes")
    found = parser.parse_args()
    if found.cpu_time and found.threads != 1:
        parser.error("--cpu-time goes with --threads 1")
    clock = time.thread_time if found.cpu_time else time.perf_counter
    if not found.folder.exists():
        write(found.folder, found.layers)
    bench = Bench(found.folder, found.quantization, found.threads)
    needed, memory = step_bytes(bench), torch.zeros(READ_BYTES // 4)
    read_speed(memory, clock)
    seconds, speeds, shares = [], [], []
    for _ in range(found.rounds):
        before = read_speed(memory, clock)
        seconds.append(step_seconds(bench, found.steps, clock))
        speeds.append(max(before, read_speed(memory, clock)))
        shares.append(needed / seconds[-1] / speeds[-1])
    print(
        f"{found.quantization or 'bfloat16'}: {1e3 * statistics.median(seconds):.2f} ms a step "
        f"({1e3 * min(seconds):.2f}), {needed / 1e6:.1f} MB, {needed / statistics.median(seconds) / 1e9:.1f} GB/s; "
        f"plain reading {statistics.median(speeds) / 1e9:.1f} GB/s; share {100 * statistics.median(shares):.0f} % "
        f"({100 * min(shares):.0f} to {100 * max(shares):.0f})"
    )


if __name__ == "__main__":
    main()
