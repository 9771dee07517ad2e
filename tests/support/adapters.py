"""Adapter folders as PEFT saves them, over the tiny checkpoints, and the same adapters merged into their bases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import read_weights, write_weights

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."


def make_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    targets: Sequence[str] = ALL,
    ranks: Mapping[str, int] | None = None,
    within: str = "layers.",
    size: float = 0.2,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Random matrices for the base's layers of these names, at keys that have `within`. `ranks`: of some names."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, weight in read_weights(base).items():
        module = key.removesuffix(".weight")
        if not key.endswith(".weight") or within not in key or module.rpartition(".")[2] not in targets:
            continue
        own = next((r for name, r in (ranks or {}).items() if module.endswith(name)), rank)
        outer = torch.randn(weight.shape[0], own, generator=random) * size
        tensors[f"{PREFIX}{module}.lora_A.weight"] = (
            torch.randn(own, weight.shape[1], generator=random) / weight.shape[1] ** 0.5
        ).to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = outer.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "rank_pattern": dict(ranks or {}),
        "alpha_pattern": {},
        "bias": "none",
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "loftq_config": {},
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def deltas(adapter: Path, scales: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """What it adds to the base's weights, by their keys. `scales`: by the ends of names, "" for the others."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, inner in tensors.items():
        module, _, part = key.removeprefix(PREFIX).partition(".lora_")
        if part != "A.weight":
            continue
        scale = next((s for name, s in scales.items() if name and module.endswith(name)), scales[""])
        outer = tensors[f"{PREFIX}{module}.lora_B.weight"]
        found[f"{module}.weight"] = scale * (outer.float() @ inner.float())
    return found


def merge(base: Path, adapter: Path, out: Path, scales: Mapping[str, float]) -> Path:
    """The base's checkpoint with the adapter in its weights."""
    shutil.copytree(base, out)
    weights = read_weights(base)
    for key, delta in deltas(adapter, scales).items():
        weights[key] = weights[key] + delta
    write_weights(out, weights)
    return out
