"""Write the built-in model: a random Qwen2-VL in ordinary checkpoint files, the hub's dialect, about 2 MB.

    python tools/make_demo.py [FOLDER]          # default: src/sensorium/demo

Deterministic: the same versions write the same bytes. The model knows nothing and answers noise; it is there so that a
fresh install serves something at once. Needs numpy and tokenizers, which the package needs too.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 1024
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 128, 256, 2, 4, 2
VISION_DIM, VISION_DEPTH, VISION_HEADS = 64, 2, 4
PATCH, MERGE, TEMPORAL = 14, 2, 2

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
            "<|image_pad|>", "<|video_pad|>")

CHAT_TEMPLATE = """\
{%- if messages and messages[0]['role'] != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] in ('video', 'video_url') -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

# What the tokenizer is trained on: sentences put together from these.
THINGS = ("picture", "photo", "image", "circle", "square", "triangle", "star", "house", "tree", "river", "street",
          "car", "boat", "bird", "duck", "lion", "cat", "dog", "person", "table", "window", "cloud", "mountain",
          "sign", "animal")
QUALITIES = ("red", "green", "blue", "yellow", "white", "black", "small", "large", "bright", "dark", "round", "tall",
             "left", "right", "first", "second", "old", "new", "quiet", "beautiful")
ACTIONS = ("shows", "contains", "describes", "answers", "stands near", "moves towards", "lies under", "looks like",
           "belongs to", "comes before", "follows", "is above", "is below", "has")
FRAMES = ("The {q} {a} {v} the {r} {b}.", "What is the {q} {a} in this {b}?", "There are {n} {q} {a}s and one {b}.",
          "Please describe this {a}: it {v} a {q} {b}.", "I think that the {a} {v} {n} {r} {b}s, but I don't know why.",
          "How many {a}s can you see in the {q} {b}?", "You are a helpful assistant. The {a} {v} the {b}.",
          "请描述这张图片。", "图片里有{n}个东西。")


def sentences(count: int) -> list[str]:
    rng = random.Random(0)
    return [rng.choice(FRAMES).format(
        a=rng.choice(THINGS), b=rng.choice(THINGS), q=rng.choice(QUALITIES), r=rng.choice(QUALITIES),
        v=rng.choice(ACTIONS), n=rng.randrange(100)) for _ in range(count)]


def make_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-level BPE of exactly VOCAB_SIZE ids; returns the special tokens' ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(sentences(20_000), trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    fill_up(tokenizer_file := folder / "tokenizer.json", tokenizer)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} ids, not {VOCAB_SIZE}")
    tokenizer.save(str(tokenizer_file))
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    return {name: vocab[name] for name in SPECIALS}


def fill_up(file: Path, tokenizer: Tokenizer) -> None:
    """Give ids that training left over to numbered words, so that every id decodes to visible text."""
    data = json.loads(tokenizer.to_str())
    vocab = data["model"]["vocab"]
    for index in range(len(vocab), VOCAB_SIZE - len(SPECIALS)):
        vocab[f"\u0120w{index}"] = index
    file.write_text(json.dumps(data, ensure_ascii=False))


def config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}, "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": True, "use_sliding_window": False,
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"], "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "model_type": "qwen2_vl", "depth": VISION_DEPTH, "embed_dim": VISION_DIM, "hidden_size": HIDDEN,
            "num_heads": VISION_HEADS, "mlp_ratio": 4, "in_chans": 3, "hidden_act": "quick_gelu", "patch_size": PATCH,
            "spatial_patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": TEMPORAL}}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by the names that published Qwen2-VL files have."""
    kv_dim = HIDDEN // HEADS * KV_HEADS
    merged = VISION_DIM * MERGE**2
    result: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        own = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,),
               "self_attn.o_proj.weight": (HIDDEN, HIDDEN), "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
               "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN), "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
        for name, rows in (("q", HIDDEN), ("k", kv_dim), ("v", kv_dim)):
            own |= {f"self_attn.{name}_proj.weight": (rows, HIDDEN), f"self_attn.{name}_proj.bias": (rows,)}
        result |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    result["visual.patch_embed.proj.weight"] = (VISION_DIM, 3, TEMPORAL, PATCH, PATCH)
    linears = {"attn.qkv": (3 * VISION_DIM, VISION_DIM), "attn.proj": (VISION_DIM, VISION_DIM),
               "mlp.fc1": (4 * VISION_DIM, VISION_DIM), "mlp.fc2": (VISION_DIM, 4 * VISION_DIM)}
    for layer in range(VISION_DEPTH):
        for name, shape in (linears | {"norm1": (VISION_DIM,), "norm2": (VISION_DIM,)}).items():
            prefix = f"visual.blocks.{layer}.{name}"
            result |= {f"{prefix}.weight": shape, f"{prefix}.bias": shape[:1]}
    for name, shape in (("ln_q", (VISION_DIM,)), ("mlp.0", (merged, merged)), ("mlp.2", (HIDDEN, merged))):
        result |= {f"visual.merger.{name}.weight": shape, f"visual.merger.{name}.bias": shape[:1]}
    return result


def bfloat16(values: np.ndarray) -> bytes:
    """float32 -> bfloat16, rounded to nearest even."""
    bits = values.astype("<f4").view("<u4")
    data: bytes = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return data


def tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return (rng.standard_normal(shape) * 0.05).astype(np.float32)


def write_safetensors(file: Path, tensors: dict[str, tuple[tuple[int, ...], bytes]]) -> None:
    """The format is a length, a JSON header and the bytes; written here because numpy knows no bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    file.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(data for _, data in tensors.values()))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ids = make_tokenizer(folder)
    files = {
        "config.json": config(ids),
        "generation_config.json": {"bos_token_id": ids["<|endoftext|>"], "do_sample": True, "temperature": 0.8,
                                   "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
                                   "pad_token_id": ids["<|endoftext|>"]},
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor", "min_pixels": 3136,
            "max_pixels": 1003520, "patch_size": PATCH, "temporal_patch_size": TEMPORAL, "merge_size": MERGE,
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
        "tokenizer_config.json": {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<|im_end|>",
                                  "pad_token": "<|endoftext|>", "model_max_length": 8192, "add_bos_token": False}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    rng = np.random.default_rng(0)
    write_safetensors(folder / "model.safetensors", {
        name: (shape, bfloat16(tensor(rng, name, shape))) for name, shape in sorted(shapes().items())})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "src" / "sensorium" / "demo")
