"""What a draft model gains and costs: `python benchmarks/drafting.py FOLDER [--cpu-time --threads 1]`.

The engine alone, with and without `--draft-model`, in turn, with two Llamas of random weights that FOLDER keeps for the
next run: by default 17 times as many weights in the model as in the draft model. Both compute every step and then say a
token of a script: the model the next one, the draft model that one, or another one, as often as `--right` says. Random
tokens, so that prompt look-up finds nothing. Figures are tokens a second from the first token on, medians of rounds;
catching up with the prompts is in them. On a busy machine one thread with --cpu-time says more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import Bench
from lookup import Scripted, pairs
from safetensors.torch import save_file

from sensorium.engine import loop
from sensorium.engine.sampler import Sampled

VOCAB = 8192
MODEL, DRAFT = (16, 1024), (4, 512)  # layers, hidden size


def write(folder: Path, layers: int, hidden: int) -> None:
    folder.mkdir(parents=True)

    def noise(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5)

    inner = 4 * hidden
    shapes = {f"self_attn.{name}_proj": (hidden if name in "qo" else hidden // 4, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    tensors = {name: noise(VOCAB, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for layer in range(layers):
        place = f"model.layers.{layer}"
        tensors |= {f"{place}.{name}.weight": noise(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{place}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": VOCAB},
        **{"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "rms_norm_eps": 1e-5},
        **{"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256, "max_position_embeddings": 4096},
    }
    (folder / "config.json").write_text(json.dumps(config))


def guess(side: Scripted, right: float) -> None:
    """Have the draft model of a side know its scripts so often."""
    drafting = side.bench.engine.drafting
    if drafting is None or drafting._model is None:
        raise SystemExit("no draft model, or it failed")
    sampler, random = drafting._model._sampler, np.random.default_rng(0)
    sample = type(sampler).sample

    def say(logits: Any, sequences: Any) -> Sampled:
        sample(sampler, logits, sequences)
        known = [side.scripts[seq.id][seq.num_outputs] for seq in sequences]
        return Sampled([token if random.random() < right else token + 1 for token in known])

    sampler.sample = say  # type: ignore[method-assign,assignment]
    drafting._clock = side.clock


def compare(found: argparse.Namespace, plain: Scripted, right: float, clock: Callable[[], float]) -> None:
    """A row for each number of sequences; the round in which all is new does not count."""
    for count in found.at_once:
        folder = found.folder
        side = Scripted(
            Bench(folder / "model", None, found.threads, speculative_tokens=16, draft=folder / "draft"), clock
        )
        guess(side, right)
        rates = []
        for number in range(found.rounds + 1):
            asked = pairs("random", count, found.tokens, np.random.default_rng(number))
            one, other = (plain, side) if number % 2 else (side, plain)  # each begins as often
            found_rates = {id(one): one.rate(asked), id(other): other.rate(asked)}
            rates.append([found_rates[id(plain)], found_rates[id(side)]])
        without, drafted = (statistics.median(one) for one in zip(*rates[1:], strict=True))
        ratio = statistics.median(b / a for a, b in rates[1:])
        counts = side.bench.engine.drafting
        told = "" if counts is None else f"{counts.num_accepted_tokens} of {counts.num_draft_tokens}"
        print(f"| {right} | {count} | {told} | {without:.1f} | {drafted:.1f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true", help="time of the processor, not of the clock")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200, help="of each prompt and answer")
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--right", type=float, nargs="*", default=[1.0, 0.8, 0.5, 0.0], help="part of the guesses")
    found = parser.parse_args()
    for name, shape in (("model", MODEL), ("draft", DRAFT)):
        if not (found.folder / name).exists():
            write(found.folder / name, *shape)
    clock = time.process_time if found.cpu_time else time.perf_counter
    loop.monotonic = clock  # type: ignore[attr-defined]  # what steps are measured with
    plain = Scripted(Bench(found.folder / "model", None, found.threads), clock)
    print(
        "| guesses right | at once | of all rounds | without, tok/s | with, tok/s | ratio |\n|---|---|---|---|---|---|"
    )
    for right in found.right:
        compare(found, plain, right, clock)


if __name__ == "__main__":
    main()
