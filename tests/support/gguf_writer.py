"""Writes GGUF files by the format's description: containers, and tiny checkpoints of the hub's layout in them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sensorium.checkpoint.gguf_names import ARCHITECTURES

NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14, "BF16": 30}
EPSILONS = {"layer_norm_rms_epsilon": "rms_norm_eps", "layer_norm_epsilon": "layer_norm_eps"}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(one: Any) -> bytes:
    """With its type's number before it."""
    if isinstance(one, bool):
        return struct.pack("<I?", 7, one)
    if isinstance(one, int):
        return struct.pack("<II", 4, one) if one >= 0 else struct.pack("<Ii", 5, one)
    if isinstance(one, float):
        return struct.pack("<If", 6, one)
    if isinstance(one, str):
        return struct.pack("<I", 8) + text(one)
    kind = value(one[0])[:4]
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(one)) + b"".join(value(item)[4:] for item in one)


def container(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """Tensors by name: type, shape with the fastest dimension last, data."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + value(one) for key, one in metadata.items())
    data = b""
    for name, (kind, shape, content) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", NUMBERS[kind], len(data))
        data += content + bytes(-len(content) % 32)
    return head + bytes(-len(head) % 32) + data


def encoded(weight: Tensor, kind: str) -> bytes:
    if kind in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        return weight.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    if kind in ("Q4_K", "Q6_K"):
        return {"Q4_K": _q4_k, "Q6_K": _q6_k}[kind](weight.float()).numpy().tobytes()
    groups = weight.float().reshape(-1, 32)
    if kind == "Q4_1":
        low = groups.amin(1, keepdim=True).half()
        scale = ((groups.amax(1, keepdim=True) - low.float()) / 15).half()
        numbers = ((groups - low.float()) / scale.float()).round().nan_to_num().clamp(0, 15).to(torch.uint8)
        parts = (scale.view(torch.uint8), low.view(torch.uint8), numbers[:, :16] | numbers[:, 16:] << 4)
        return torch.cat(parts, 1).numpy().tobytes()
    steps = {"Q4_0": 7, "Q8_0": 127}[kind]
    scale = (groups.abs().amax(1, keepdim=True) / steps).half()
    codes = (groups / scale.float()).round().nan_to_num().clamp(-steps, steps).to(torch.int8)
    if kind == "Q4_0":
        unsigned = (codes + 8).view(torch.uint8)
        codes = unsigned[:, :16] | unsigned[:, 16:] << 4
    return torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), 1).numpy().tobytes()


def _halves(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 1] -> (their float16 bytes [n, 2], what those say); no zero, by which is divided."""
    kept = numbers.clamp(min=1e-6).half()
    return kept.view(torch.uint8), kept.float()


def _q6_k(weight: Tensor) -> Tensor:
    """Scales of 16 weights in steps of the block's largest scale / 127."""
    groups = weight.reshape(-1, 16, 16)
    scales = groups.abs().amax(2) / 31
    d_bytes, d = _halves(scales.amax(1, keepdim=True) / 127)
    steps = (scales / d).round().clamp(1, 127)
    codes = ((groups / (d * steps).unsqueeze(2)).round().clamp(-32, 31) + 32).to(torch.uint8).view(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    ql = torch.stack((low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4), 2).flatten(1)
    qh = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).flatten(1)
    return torch.cat((ql, qh, steps.to(torch.int8).view(torch.uint8), d_bytes), 1)


def _q4_k(weight: Tensor) -> Tensor:
    """Scales, and what is taken away, of 32 weights in steps of the block's largest / 63."""
    groups = weight.reshape(-1, 8, 32)
    least = -groups.amin(2).clamp(max=0)
    scales = (groups.amax(2) + least).clamp(min=0) / 15
    d_bytes, d = _halves(scales.amax(1, keepdim=True) / 63)
    m_bytes, m = _halves(least.amax(1, keepdim=True) / 63)
    sc, mn = ((one / step).round().clamp(0, 63) for one, step in ((scales, d), (least, m)))
    codes = ((groups + (m * mn).unsqueeze(2)) / (d * sc.clamp(min=1)).unsqueeze(2)).round().clamp(0, 15)
    s, o, codes = sc.to(torch.uint8), mn.to(torch.uint8), codes.to(torch.uint8)
    packed = (s[:, :4] | s[:, 4:] >> 4 << 6, o[:, :4] | o[:, 4:] >> 4 << 6, (s[:, 4:] & 15) | (o[:, 4:] & 15) << 4)
    return torch.cat((d_bytes, m_bytes, *packed, (codes[:, ::2] | codes[:, 1::2] << 4).flatten(1)), 1)


def write_gguf(
    folder: Path,
    file: Path,
    kind: str | Mapping[str, str],
    tokenizer: Mapping[str, Any],
    name: str,
    parts: int = 1,
    **more: Any,
) -> None:
    """The checkpoint in `folder`, its matrices as `kind`, or as it says by the last part of their names ("": others);
    in several files where there are `parts`."""
    kinds = {"": kind} if isinstance(kind, str) else kind
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or config
    rope = rope.get("full_attention", rope)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    metadata = {
        "general.architecture": name,
        f"{name}.context_length": config["max_position_embeddings"],
        f"{name}.embedding_length": config["hidden_size"],
        f"{name}.block_count": config["num_hidden_layers"],
        f"{name}.feed_forward_length": config["intermediate_size"],
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": kv_heads,
        f"{name}.attention.key_length": head_dim,
        f"{name}.attention.value_length": head_dim,
        **{f"{name}.attention.{key}": config[own] for key, own in EPSILONS.items() if own in config},
        f"{name}.rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        **tokenizer,
        **more,
    }
    architecture, tensors = ARCHITECTURES[name], {}
    names = {f"{one}": own for own, one in architecture.outer.items()}
    names |= {
        f"{architecture.layer.format(index)}{one}": f"blk.{index}.{own}"
        for index in range(config["num_hidden_layers"])
        for own, one in architecture.blocks.items()
    }
    for key, loaded in load_file(folder / "model.safetensors").items():
        weight = loaded
        base, _, part = key.rpartition(".")
        own = names[base]
        if architecture.permutes_heads and own.endswith(("attn_q", "attn_k")):
            count = heads if own.endswith("attn_q") else kv_heads
            weight = weight.view(count, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        is_norm = key.endswith("norm.weight")
        weight = weight.float() + architecture.norm_offset if is_norm else weight.float()
        stored = kinds.get(own.rpartition(".")[2], kinds[""]) if weight.dim() > 1 else "F32"
        tensors[f"{own}.{part}"] = (stored, tuple(weight.shape), encoded(weight, stored))
    if parts == 1:
        file.write_bytes(container(metadata, tensors))
        return
    for number in range(parts):
        held = dict(list(tensors.items())[number::parts])
        split = {"split.no": number, "split.count": parts, "split.tensors.count": len(tensors)}
        path = file.with_name(f"{file.stem}-{number + 1:05d}-of-{parts:05d}.gguf")
        path.write_bytes(container({**(metadata if number == 0 else {}), **split}, held))


def tokenizer_metadata(folder: Path, pre: str) -> dict[str, Any]:
    """Of a byte-level tokenizer.json."""
    stated = json.loads((folder / "tokenizer.json").read_text())
    added = {one["id"]: one for one in stated["added_tokens"]}
    vocab = {token_id: token for token, token_id in stated["model"]["vocab"].items()}
    vocab |= {token_id: one["content"] for token_id, one in added.items()}
    size = max(vocab) + 1
    kinds = [3 if i in added and added[i]["special"] else 4 if i in added else 1 for i in range(size)]
    merges = [one if isinstance(one, str) else " ".join(one) for one in stated["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [vocab[i] for i in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
    }
