"""Stop tokens, special tokens and the chat template, as a model folder's files have them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sensorium.checkpoint.values import read_json
from sensorium.errors import CheckpointError

_STOP_TOKENS = frozenset(
    {"</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>"}
)  # special tokens that end a turn or a text in every family that has them; some generation_configs forget them


def stop_token_ids(
    folder: Path, tokenizer_config: dict[str, Any], sources: Iterable[dict[str, Any]], vocab_size: int
) -> tuple[int, ...]:
    """The end tokens of the first of `sources` that names any, and every special token of `_STOP_TOKENS`.

    CheckpointError if a source has something else than ids.
    """
    stops: list[int] = []
    for source in sources:
        value = source.get("eos_token_id")
        if value is not None:
            stops = [value] if isinstance(value, int) else list(value)
            break
    if not all(isinstance(x, int) for x in stops):
        raise CheckpointError("eos_token_id must be an integer or a list of integers")
    stops += [i for i, content in special_tokens(folder, tokenizer_config) if content in _STOP_TOKENS]
    return tuple(dict.fromkeys(i for i in stops if 0 <= i < vocab_size))


def special_tokens(folder: Path, tokenizer_config: dict[str, Any]) -> list[tuple[int, str]]:
    """(id, text) of the tokens that were added to the vocabulary; [] where no file tells."""
    decoder = tokenizer_config.get("added_tokens_decoder")
    if isinstance(decoder, dict) and decoder:
        return [(int(i), str(t.get("content"))) for i, t in decoder.items() if i.isdecimal() and isinstance(t, dict)]
    try:
        with (folder / "tokenizer.json").open(encoding="utf-8") as file:
            head = file.read(1 << 20)  # added tokens stand before the vocabulary; the whole file takes long to parse
    except (OSError, ValueError):
        return []
    match = re.search(r'"added_tokens"\s*:\s*(?=\[)', head)
    if match is None:
        return []
    try:
        tokens, _ = json.JSONDecoder().raw_decode(head, match.end())
    except ValueError:
        return []
    return [(t["id"], t["content"]) for t in tokens if isinstance(t, dict) and {"id", "content"} <= t.keys()]


def special_token(tokenizer_config: Mapping[str, Any], name: str) -> str | None:
    """The text of `cls_token` and the like."""
    value = tokenizer_config.get(f"{name}_token")
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def read_vocabulary(folder: Path) -> dict[str, int]:
    """tokenizer.json's, with the tokens that were added to it, or vocab.json's."""
    stated = read_json(folder / "tokenizer.json")
    if stated is None:
        return read_json(folder / "vocab.json") or {}
    model = stated.get("model")
    pieces: Any = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(pieces, list):  # of a unigram model: each with its score
        pieces = {piece[0]: index for index, piece in enumerate(pieces)}
    added = {one["content"]: one["id"] for one in stated.get("added_tokens") or []}
    return {**(pieces or {}), **added}


def read_chat_templates(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """By name: "default" is chat_template.jinja, chat_template.json's or tokenizer_config.json's; others ("tool_use")
    come from a list of these two or from files of their own."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    template = (read_json(folder / "chat_template.json") or {}).get("chat_template")
    if template is None:
        template = tokenizer_config.get("chat_template")
    if not isinstance(template, list):
        template = [{"name": "default", "template": template}]
    found = {str(one.get("name")): one.get("template") for one in template if isinstance(one, dict)}
    return {name: text for name, text in found.items() if isinstance(text, str)} | _read_texts(files)


def _read_texts(files: dict[str, Path]) -> dict[str, str]:
    """Of those that are there."""
    found = {}
    for name, file in files.items():
        try:
            found[name] = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    return found
