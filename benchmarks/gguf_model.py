"""Writes a GGUF file of Qwen2-VL-2B's language model's shape (1.54 B), weights random, as llama-quantize mixes types.

    python benchmarks/gguf_model.py {Q4_K_M,Q4_0,Q8_0} OUT.gguf [--layers 28]

Blocks are random codes with scales that keep a weight near 0.02: what a product costs does not depend on more. The
tokenizer has all bytes and as many merges as the vocabulary needs.
"""

from __future__ import annotations

import argparse
import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HIDDEN, LAYERS, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 1536, 28, 8960, 12, 2, 128, 151936
MIXES = {"Q4_K_M": ("Q4_K", "Q6_K", 15), "Q4_0": ("Q4_0", "Q6_K", 2), "Q8_0": ("Q8_0", "Q8_0", 7)}
"""Of most weights, of the head and (Q4_K_M) some others, and the file type's number."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


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


def tensors(mix: str, layers: int) -> Iterator[Stored]:
    most, more, _ = MIXES[mix]
    yield Stored("token_embd.weight", more, (VOCABULARY, HIDDEN))
    yield Stored("output_norm.weight", "F32", (HIDDEN,))
    kv = KV_HEADS * HEAD_DIM
    for index in range(layers):
        special = more if mix == "Q4_K_M" and takes_more(index, layers) else most
        for name, kind, *shape in (
            ("attn_norm.weight", "F32", HIDDEN),
            ("attn_q.weight", most, HIDDEN, HIDDEN),
            ("attn_q.bias", "F32", HIDDEN),
            ("attn_k.weight", most, kv, HIDDEN),
            ("attn_k.bias", "F32", kv),
            ("attn_v.weight", special, kv, HIDDEN),
            ("attn_v.bias", "F32", kv),
            ("attn_output.weight", most, HIDDEN, HIDDEN),
            ("ffn_norm.weight", "F32", HIDDEN),
            ("ffn_gate.weight", most, INNER, HIDDEN),
            ("ffn_up.weight", most, INNER, HIDDEN),
            ("ffn_down.weight", special, HIDDEN, INNER),
        ):
            yield Stored(f"blk.{index}.{name}", kind, tuple(shape))


def byte_names() -> list[str]:
    """The characters that byte-level tokenizers write bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def vocabulary() -> tuple[list[str], list[str]]:
    """(tokens, merges): bytes, pairs of them, then pairs with one more."""
    alphabet = byte_names()
    count = VOCABULARY - len(alphabet) - len(SPECIAL)
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


def metadata(mix: str, layers: int) -> dict[str, Any]:
    tokens, merges = vocabulary()
    return {
        "general.architecture": "qwen2",
        "general.file_type": MIXES[mix][2],
        "qwen2.block_count": layers,
        "qwen2.context_length": 32768,
        "qwen2.embedding_length": HIDDEN,
        "qwen2.feed_forward_length": INNER,
        "qwen2.attention.head_count": HEADS,
        "qwen2.attention.head_count_kv": KV_HEADS,
        "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen2.rope.freq_base": 1e6,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - len(SPECIAL)) + [3] * len(SPECIAL),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.padding_token_id": len(tokens) - len(SPECIAL),
        "tokenizer.chat_template": TEMPLATE,
    }


def write(mix: str, out: Path, layers: int) -> None:
    stored, stated, at = list(tensors(mix, layers)), metadata(mix, layers), 0
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
    parser.add_argument("--layers", type=int, default=LAYERS)
    found = parser.parse_args()
    write(found.mix, found.out, found.layers)


if __name__ == "__main__":
    main()
