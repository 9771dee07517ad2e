"""How long a sequence may be: the one rule, and who bounds what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensorium.checkpoint.families import EncoderDefaults, Family
from sensorium.checkpoint.pooling import stated_max_length
from sensorium.checkpoint.text_config import TextConfig, text_part
from sensorium.checkpoint.values import count, positive_int


def context_length(checkpoint_len: int, wanted: int | None = None, capacity: int | None = None) -> int:
    """Tokens of a prompt and its completion together (`max_model_len`): the least of what bounds them.

    `checkpoint_len` is `Checkpoint.max_model_len`: the positions that the model has, or less where its files say so.
    `wanted` is --max-model-len, None where the operator leaves it to the checkpoint; the command line refuses one that
    is larger than the checkpoint's. `capacity` is how many tokens the KV cache holds, None where there is no cache or
    its size is not known yet: the HTTP process knows it once the engine is ready (`EngineReady.max_model_len`).
    """
    return min(bound for bound in (checkpoint_len, wanted or None, capacity) if bound is not None)


def checkpoint_length(
    folder: Path, config: dict[str, Any], family: Family, text: TextConfig | None, tokenizer_config: Mapping[str, Any]
) -> int:
    """Positions that the model has, or less where the files of an encoder or of sentence-transformers say less.

    `text` is None for encoders. CheckpointError if config.json has no usable number.
    """
    positions = text.max_len if text else encoder_positions(text_part(config), family.encoder or EncoderDefaults())
    if text is not None and not (folder / "modules.json").is_file():
        return positions
    return min(positions, stated_max_length(folder, tokenizer_config) or positions)


def encoder_positions(config: dict[str, Any], encoder: EncoderDefaults) -> int:
    """An encoder's position table, without the rows before its first position."""
    return positive_int(config, "max_position_embeddings", encoder.max_positions) - first_position(config, encoder)


def first_position(config: Mapping[str, Any], encoder: EncoderDefaults) -> int:
    """The position of a text's first token: 0, or of the RoBERTas the one after the padding id, 1 if not stated."""
    if not encoder.starts_after_padding:
        return 0
    padding = config.get("pad_token_id") if encoder.padding is None else encoder.padding
    return (1 if padding is None else int(padding)) + 1


def token_types(config: dict[str, Any], encoder: EncoderDefaults) -> int:
    """How many segments the encoder tells apart; 0: none."""
    return count(config, "type_vocab_size", encoder.type_vocab_size) if encoder.reads_types else 0
