"""Writes a GGUF file of a published shape with random weights, as llama-quantize mixes types.

    python benchmarks/gguf_model.py {Q4_K_M,Q4_0,Q8_0} OUT.gguf [--shape qwen2-vl-2b|qwen3-30b-a3b] [--layers 28]

The first is the language model of Qwen2-VL-2B (1.54 B), the second a mixture of experts, whose vocabulary is small so
that of few layers the experts take the time.
"""

from __future__ import annotations

import argparse
import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MIXES = {"Q4_K_M": ("Q4_K", "Q6_K", 15), "Q4_0": ("Q4_0", "Q6_K", 2), "Q8_0": ("Q8_0", "Q8_0", 7)}
"""Of most weights, of the head and (Q4_K_M) some others, and the file type's number."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class Shape(NamedTuple):
    architecture: str
    hidden: int
    layers: int
    inner: int  # of an expert, where there are some
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int = 0
    per_token: int = 0


SHAPES = {
    "qwen2-vl-2b": Shape("qwen2", 1536, 28, 8960, 12, 2, 128, 151936),
    "qwen3-30b-a3b": Shape("qwen3moe", 2048, 48, 768, 32, 4, 128, 8192, experts=128, per_token=8),
}


class Kind(NamedTuple):
    number: int
    weights: int  # of a block
    nbytes: int
    halves: dict[int, float]  # where a block has a float16, and what it is about


KINDS = {
    "F32": Kind(0, 1, 4, {}),
    "Q4_0": Kind(2, 32, 18, {0: 0.004}),
    "Q8_0": Kind(8, 32, 34, {0: 0.0003}),
    "Q4_K": Kind(12, 256, 144, {0: 1e-4, 2: 7.5e-4}),
    "Q6_K": Kind(14, 256, 210, {208: 1.5e-5}),
}


class Stored(NamedTuple):
    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        kind = KINDS[self.kind]
        return int(np.prod(self.shape)) // kind.weights * kind.nbytes

    def content(self, random: np.random.Generator) -> bytes:
        kind = KINDS[self.kind]
        if self.kind == "F32":
            near = 1.0 if self.name.endswith("norm.weight") else 0.0
            return (near + 0.02 * random.standard_normal(self.shape, dtype=np.float32)).tobytes()
        blocks = np.frombuffer(random.bytes(self.nbytes), np.uint8).reshape(-1, kind.nbytes).copy()
        for at, size in kind.halves.items():
            scales = (size * random.uniform(0.5, 1.5, len(blocks))).astype(np.float16)
            blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
        return blocks.tobytes()


def takes_more(layer: int, layers: int) -> bool:
    """Whether llama-quantize's mix M gives this layer's v and down more bits."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def tensors(shape: Shape, mix: str, layers: int) -> Iterator[Stored]:
    most, more, _ = MIXES[mix]
    yield Stored("token_embd.weight", more, (shape.vocabulary, shape.hidden))
    yield Stored("output_norm.weight", "F32", (shape.hidden,))
    for index in range(layers):
        special = more if mix == "Q4_K_M" and takes_more(index, layers) else most
        for name, kind, *size in (*attention(shape, most, special), *feed_forward(shape, most, special)):
            yield Stored(f"blk.{index}.{name}", kind, tuple(size))


def attention(shape: Shape, most: str, special: str) -> Iterator[tuple[str, str, *tuple[int, ...]]]:
    hidden, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "attn_norm.weight", "F32", hidden
    yield "attn_q.weight", most, q, hidden
    yield "attn_k.weight", most, kv, hidden
    yield "attn_v.weight", special, kv, hidden
    yield "attn_output.weight", most, hidden, q
    if shape.experts:
        yield "attn_q_norm.weight", "F32", shape.head_dim
        yield "attn_k_norm.weight", "F32", shape.head_dim
    else:
        yield "attn_q.bias", "F32", q
        yield "attn_k.bias", "F32", kv
        yield "attn_v.bias", "F32", kv


def feed_forward(shape: Shape, most: str, special: str) -> Iterator[tuple[str, str, *tuple[int, ...]]]:
    hidden, inner = shape.hidden, shape.inner
    several, of_each = ((shape.experts,), "_exps") if shape.experts else ((), "")
    yield "ffn_norm.weight", "F32", hidden
    if shape.experts:
        yield "ffn_gate_inp.weight", "F32", shape.experts, hidden
    yield f"ffn_gate{of_each}.weight", most, *several, inner, hidden
    yield f"ffn_up{of_each}.weight", most, *several, inner, hidden
    yield f"ffn_down{of_each}.weight", special, *several, hidden, inner


def byte_names() -> list[str]:
    """The characters that byte-level tokenizers write bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def vocabulary(size: int) -> tuple[list[str], list[str]]:
    """(tokens, merges): bytes, pairs of them, then pairs with one more."""
    alphabet = byte_names()
    count = size - len(alphabet) - len(SPECIAL)
    pairs = [(one, other) for one in alphabet for other in alphabet]
    longer = ((one + other, third) for (one, other), third in itertools.product(pairs, alphabet))
    merges = list(itertools.islice(itertools.chain(pairs, longer), count))
    return [*alphabet, *("".join(pair) for pair in merges), *SPECIAL], [" ".join(pair) for pair in merges]


def text(value: str) -> bytes:
    octets = value.encode()
    return struct.pack("<Q", len(octets)) + octets


def value(one: Any) -> bytes:
    """With its type's number before it."""
    if isinstance(one, int):
        return struct.pack("<II", 4, one)
    if isinstance(one, float):
        return struct.pack("<If", 6, one)
    if isinstance(one, str):
        return struct.pack("<I", 8) + text(one)
    if isinstance(one[0], int):
        return struct.pack("<IIQ", 9, 5, len(one)) + struct.pack(f"<{len(one)}i", *one)
    return struct.pack("<IIQ", 9, 8, len(one)) + b"".join(map(text, one))


def metadata(shape: Shape, mix: str, layers: int) -> dict[str, Any]:
    tokens, merges = vocabulary(shape.vocabulary)
    stated: dict[str, Any] = {
        "block_count": layers,
        "context_length": 32768,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.inner,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
    }
    if shape.experts:
        stated["expert_count"], stated["expert_used_count"] = shape.experts, shape.per_token
        stated["expert_feed_forward_length"] = shape.inner
    return {
        "general.architecture": shape.architecture,
        "general.file_type": MIXES[mix][2],
        **{f"{shape.architecture}.{name}": one for name, one in stated.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - len(SPECIAL)) + [3] * len(SPECIAL),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.padding_token_id": len(tokens) - len(SPECIAL),
        "tokenizer.chat_template": TEMPLATE,
    }


def write(shape: Shape, mix: str, out: Path, layers: int) -> None:
    stored, stated, at = list(tensors(shape, mix, layers)), metadata(shape, mix, layers), 0
    head = b"GGUF" + struct.pack("<IQQ", 3, len(stored), len(stated))
    head += b"".join(text(key) + value(one) for key, one in stated.items())
    for one in stored:
        head += text(one.name) + struct.pack(f"<I{len(one.shape)}Q", len(one.shape), *one.shape[::-1])
        head += struct.pack("<IQ", KINDS[one.kind].number, at)
        at += one.nbytes + -one.nbytes % 32
    random = np.random.default_rng(0)
    with out.open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        for one in stored:
            file.write(one.content(random) + bytes(-one.nbytes % 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mix", choices=MIXES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-vl-2b")
    parser.add_argument("--layers", type=int, help="of the shape's, all by default")
    found = parser.parse_args()
    shape = SHAPES[found.shape]
    write(shape, found.mix, found.out, found.layers or shape.layers)


if __name__ == "__main__":
    main()
