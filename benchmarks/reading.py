"""How near to memory's speed a sequence decodes: `python benchmarks/reading.py SHAPE FOLDER [--quantization int4]`.

Layers of a model's shape with a small vocabulary, random weights; FOLDER keeps the checkpoint for the next run. A step
must read all weights, of experts those that its token takes. Every round times plain reading of a gigabyte, with as
many threads, before and after its steps: the share is of the faster one. On a busy machine one thread with --cpu-time
says more: waiting for the processor is then no part of either.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine import Bench
from safetensors.torch import save_file

from sensorium.models.experts import RoutedMLP
from sensorium.models.layers import Linear

READ_BYTES = 1 << 30
VOCAB = 2048

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048},
        **{"intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "norm_topk_prob": True},
        **{"rope_theta": 1e6, "rms_norm_eps": 1e-6},
    },
    "qwen3.5-0.8b": {
        **{"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "hidden_size": 1024},
        **{"intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256},
        **{"linear_num_key_heads": 16, "linear_num_value_heads": 16},
    },
    "qwen3.5-4b": {
        **{"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "hidden_size": 2560},
        **{"intermediate_size": 9216, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256},
        **{"linear_num_key_heads": 16, "linear_num_value_heads": 32},
    },
    "lfm2-1.2b": {
        **{"architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "hidden_size": 2048, "block_ff_dim": 12288},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "conv_L_cache": 3, "block_multiple_of": 256},
    },
}
DELTA_NET = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}


def noise(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5)


def attention(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """By the names of Qwen's files."""
    size, heads, kv_heads = (config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    dim = config.get("head_dim", size // heads)
    queries = 2 if "linear_num_key_heads" in config else 1  # and a gate for each
    return {
        "q_proj.weight": noise(queries * heads * dim, size),
        **{f"{name}_proj.weight": noise(kv_heads * dim, size) for name in "kv"},
        "o_proj.weight": noise(size, heads * dim),
        **{f"{name}_norm.weight": torch.ones(dim, dtype=torch.bfloat16) for name in "qk"},
    }


def delta_net(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    size, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys, values = (128 * config[f"linear_num_{name}_heads"] for name in ("key", "value"))
    return {
        "in_proj_qkv.weight": noise(2 * keys + values, size),
        "in_proj_z.weight": noise(values, size),
        **{f"in_proj_{name}.weight": noise(heads, size) for name in "ab"},
        "conv1d.weight": noise(2 * keys + values, 1, 4),
        "A_log": torch.rand(heads),
        "dt_bias": torch.rand(heads),
        "norm.weight": torch.ones(128, dtype=torch.bfloat16),
        "out_proj.weight": noise(size, values),
    }


def mlp(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    size, inner = config["hidden_size"], config.get("intermediate_size", 0)
    if experts := config.get("num_experts"):
        inner = config["moe_intermediate_size"]
        return {
            "gate.weight": noise(experts, size),
            "experts.gate_up_proj": noise(experts, 2 * inner, size),
            "experts.down_proj": noise(experts, size, inner),
        }
    return {
        **{f"{name}_proj.weight": noise(inner, size) for name in ("gate", "up")},
        "down_proj.weight": noise(size, inner),
    }


def qwen_layer(config: dict[str, Any], *, attends: bool) -> dict[str, torch.Tensor]:
    ones = torch.ones(config["hidden_size"], dtype=torch.bfloat16)
    mixer = ("self_attn", attention(config)) if attends else ("linear_attn", delta_net(config))
    return {
        **{"input_layernorm.weight": ones, "post_attention_layernorm.weight": ones.clone()},
        **{f"{mixer[0]}.{name}": tensor for name, tensor in mixer[1].items()},
        **{f"mlp.{name}": tensor for name, tensor in mlp(config).items()},
    }


def lfm2_layer(config: dict[str, Any], *, attends: bool) -> dict[str, torch.Tensor]:
    size, inner = config["hidden_size"], config["block_ff_dim"] * 2 // 3
    ones = torch.ones(size, dtype=torch.bfloat16)
    renamed = {"o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"}
    own = {
        f"self_attn.{renamed.get(name.partition('.')[0], name.partition('.')[0])}.weight": tensor
        for name, tensor in attention(config).items()
    }
    conv = {
        "conv.conv.weight": noise(size, 1, config["conv_L_cache"]),
        **{"conv.in_proj.weight": noise(3 * size, size), "conv.out_proj.weight": noise(size, size)},
    }
    return {
        **{"operator_norm.weight": ones, "ffn_norm.weight": ones.clone()},
        **(own if attends else conv),
        **{f"feed_forward.{name}.weight": noise(inner, size) for name in ("w1", "w3")},
        "feed_forward.w2.weight": noise(size, inner),
    }


def write(folder: Path, shape: str, layers: int) -> None:
    """The checkpoint; all layers of a kind have the same numbers. Of those with states every fourth one attends."""
    folder.mkdir(parents=True)
    config = SHAPES[shape]
    is_lfm2 = config["model_type"] == "lfm2"
    state = "conv" if is_lfm2 else "linear_attention" if "linear_num_key_heads" in config else "full_attention"
    kinds = ["full_attention" if index % 4 == 3 else state for index in range(layers)]
    make = lfm2_layer if is_lfm2 else qwen_layer
    made = {kind: make(config, attends=kind == "full_attention") for kind in dict.fromkeys(kinds)}
    outside = {name: noise(VOCAB, config["hidden_size"]) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    norm = "model.embedding_norm.weight" if is_lfm2 else "model.norm.weight"
    parts = [
        {f"model.layers.{i}.{name}": tensor for name, tensor in made[kind].items()} for i, kind in enumerate(kinds)
    ]
    files: dict[str, str] = {}
    first = {**outside, norm: torch.ones(config["hidden_size"], dtype=torch.bfloat16)}
    for index, part in enumerate([first, *parts]):
        files |= dict.fromkeys(part, f"model-{index}.safetensors")
        save_file(part, folder / f"model-{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = {
        **{**config, **(DELTA_NET if state == "linear_attention" else {}), "dtype": "bfloat16", "vocab_size": VOCAB},
        **{"num_hidden_layers": layers, "max_position_embeddings": 8192, "tie_word_embeddings": False},
        **({} if state == "full_attention" else {"layer_types": kinds}),
    }
    (folder / "config.json").write_text(json.dumps(config))


def step_bytes(bench: Bench) -> int:
    """Of weights that one token needs."""
    model = bench.model
    packed = sum(module.packed.nbytes for module in model.modules() if isinstance(module, Linear))
    for module in model.modules():
        if isinstance(module, RoutedMLP):
            experts = sum(linear.packed.nbytes for linear in module.experts.modules() if isinstance(linear, Linear))
            routing = module.routing
            packed -= experts * (routing.num_experts - routing.per_token) // routing.num_experts
    return packed


def read_speed(memory: torch.Tensor, clock: Callable[[], float]) -> float:
    """Bytes a second."""
    start = clock()
    memory.sum()
    return memory.nbytes / (clock() - start)


def step_seconds(bench: Bench, context: int, steps: int, clock: Callable[[], float]) -> float:
    bench.start(1, context, steps + 8)
    bench.decode(2)
    start = clock()
    bench.decode(steps)
    seconds = (clock() - start) / steps
    bench.finish()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=3, help="of a checkpoint that is written anew")
    parser.add_argument("--context", type=int, nargs="*", default=[64], help="tokens")
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--layer-by-layer", action="store_true", help="not all layers in one native call")
    parser.add_argument("--cpu-time", action="store_true", help="of the one thread that computes")
    found = parser.parse_args()
    if found.cpu_time and found.threads != 1:
        parser.error("--cpu-time goes with --threads 1")
    clock = time.thread_time if found.cpu_time else time.perf_counter
    if not found.folder.exists():
        write(found.folder, found.shape, found.layers)
    bench = Bench(found.folder, found.quantization, found.threads)
    if found.layer_by_layer:
        vars(bench.model.get_submodule("model"))["stack"] = None
    needed, memory = step_bytes(bench), torch.zeros(READ_BYTES // 4)
    read_speed(memory, clock)
    runs: dict[int, list[tuple[float, float]]] = {context: [] for context in found.context}  # of a step, bytes a second
    for _ in range(found.rounds):
        for context, measured in runs.items():
            before = read_speed(memory, clock)
            seconds = step_seconds(bench, context, found.steps, clock)
            measured.append((seconds, max(before, read_speed(memory, clock))))
    for context, measured in runs.items():
        steps, speeds = ([one[place] for one in measured] for place in (0, 1))
        shares = [100 * needed / seconds / speed for seconds, speed in measured]
        print(
            f"{found.quantization or 'bfloat16'}, {context} tokens of context: {1e3 * statistics.median(steps):.2f} "
            f"ms a step ({1e3 * min(steps):.2f}), {needed / 1e6:.1f} MB, "
            f"{needed / statistics.median(steps) / 1e9:.1f} GB/s; "
            f"plain reading {statistics.median(speeds) / 1e9:.1f} GB/s; share {statistics.median(shares):.0f} % "
            f"({min(shares):.0f} to {max(shares):.0f})"
        )


if __name__ == "__main__":
    main()
