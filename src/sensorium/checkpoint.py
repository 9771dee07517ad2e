"""A checkpoint's files, read without torch: where they are, what the configs say, in one dialect.

Both the HTTP process and the engine process start from `open_checkpoint`. It accepts the hub's config dialect and the
one that transformers writes today; everything after it sees only the dataclasses below. Nothing remote is executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. `kind`: default, linear, dynamic, llama3 or longrope ("su"); `mrope_section` is set for M-RoPE."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float | None = None
    partial: float = 1.0  # part of head_dim that is rotated
    mrope_section: tuple[int, ...] = ()  # frequencies per axis (time, height, width), contiguous


@dataclass(frozen=True, slots=True)
class TextConfig:
    """A Llama-like decoder's shape, every default resolved."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # bias of q, k, v
    output_bias: bool = False  # bias of o_proj
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMSNorm on every head of q and k
    sliding_window: int | None = None  # None: full attention
    hidden_act: str = "silu"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model folder. The raw JSON dictionaries are there for the family's own processor and tower."""

    folder: Path
    architecture: str  # config.json's architectures[0]
    config: dict[str, Any]  # config.json
    preprocessor: dict[str, Any]  # preprocessor_config.json (or processor_config.json's image part), {} if absent
    generation: dict[str, Any]  # generation_config.json, {} if absent
    tokenizer_config: dict[str, Any]  # {} if absent
    chat_template: str | None  # chat_template.jinja, chat_template.json or tokenizer_config's
    text: TextConfig | None  # None for encoder-only models
    dtype: str  # as stored: bfloat16, float16 or float32
    max_model_len: int
    vocab_size: int
    stop_token_ids: tuple[int, ...]  # generation_config's eos, else config's, and what the family adds
    weight_files: tuple[Path, ...]  # *.safetensors or pytorch_model*.bin, in index order
