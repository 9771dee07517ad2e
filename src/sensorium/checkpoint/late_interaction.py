"""Models of late interaction (ColBERT): a vector of every token, and how queries and documents are written. Torch-free.

Three kinds of folders tell it: Stanford's `artifact.metadata`, PyLate's and sentence-transformers' files.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensorium.checkpoint.pooling import module_folder, sentence_config
from sensorium.checkpoint.values import positive_int, read_json
from sensorium.errors import CheckpointError

QUERY_TOKENS = 32
_PYLATE = (
    "query_prefix",
    "document_prefix",
    "query_length",
    "document_length",
    "do_query_expansion",
    "attend_to_expansion_tokens",
    "attend_to_mask_tokens",
    "skiplist_words",
    "query_expansion",
)


@dataclass(frozen=True, slots=True)
class Expansion:
    """A query has `length` tokens, or at least as many: `token` (None: the mask, else the end token) fills it up, and
    others attend to it if it `is_seen`."""

    length: int
    is_fixed: bool = True
    token: str | None = None
    is_seen: bool = False


@dataclass(frozen=True, slots=True)
class Side:
    """How a query or a document is written. `marker`: the prefix, or its first word, is one token if there is such."""

    prefix: str = ""
    marker: bool = False
    suffix: str = ""  # behind the text, in special tokens' words
    max_tokens: int | None = None
    skipped: tuple[str, ...] = ()  # tokens that have no vector in the answer


@dataclass(frozen=True, slots=True)
class LateInteraction:
    query: Side = Side()
    document: Side = Side()
    expansion: Expansion | None = None  # of queries
    first: str = ""  # a token that texts begin with, also where the tokenizer does not put it there
    is_mean: bool = False  # whether a score is the mean over the query's tokens, not the sum


def read_late_interaction(folder: Path, *, is_colbert: bool) -> LateInteraction:
    """What the folder of such a model says. CheckpointError says in one line what is wrong. `is_colbert`: it is one of
    Stanford's, also where no file says more."""
    settings = read_json(folder / "config_sentence_transformers.json") or {}
    metadata = _metadata(folder)
    if metadata is not None or is_colbert:
        return _stanford(metadata or {})
    if any(key in settings for key in _PYLATE):
        return _pylate(settings)
    return _sentence_transformers(folder, settings)


def _metadata(folder: Path) -> dict[str, Any] | None:
    path = folder / "artifact.metadata"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} must be a JSON object")
    return found


def _stanford(metadata: dict[str, Any]) -> LateInteraction:
    skipped = tuple(string.punctuation) if metadata.get("mask_punctuation", True) else ()
    return LateInteraction(
        Side(f"{metadata.get('query_token_id') or '[unused0]'} ", marker=True),
        Side(
            f"{metadata.get('doc_token_id') or '[unused1]'} ",
            marker=True,
            max_tokens=_count(metadata, "doc_maxlen"),
            skipped=skipped,
        ),
        Expansion(
            _count(metadata, "query_maxlen") or QUERY_TOKENS, is_seen=bool(metadata.get("attend_to_mask_tokens"))
        ),
    )


def _pylate(settings: dict[str, Any]) -> LateInteraction:
    skipped = settings.get("skiplist_words")
    prompts = settings.get("prompts") or {}
    before = {
        role: str(settings.get(f"{role}_prefix") or "")
        + str(prompts.get(role) or "").removeprefix(str(settings.get(f"{role}_prefix") or ""))
        for role in ("query", "document")
    }
    seen = settings.get("attend_to_expansion_tokens", settings.get("attend_to_mask_tokens"))
    length = _count(settings, "query_length")
    expansion: Expansion | None = Expansion(length or QUERY_TOKENS, is_seen=bool(seen))
    if "query_expansion" in settings or settings.get("do_query_expansion") is False:
        expansion = _expansion(settings.get("query_expansion"))
    return LateInteraction(
        Side(before["query"], marker=True, max_tokens=None if expansion and expansion.is_fixed else length),
        Side(
            before["document"],
            marker=True,
            max_tokens=_count(settings, "document_length"),
            skipped=tuple(string.punctuation if skipped is None else skipped),
        ),
        expansion,
        is_mean=_is_mean(settings),
    )


def _sentence_transformers(folder: Path, settings: dict[str, Any]) -> LateInteraction:
    own = sentence_config(folder)
    mask = module_folder(folder, "MultiVectorMask")
    masked = (read_json(mask / "config.json") or {}) if mask is not None else {}
    if masked.get("keep_only_token_ids"):
        raise CheckpointError("MultiVectorMask: keep_only_token_ids is not supported")
    tasks = masked.get("skiplist_tasks") or ["document"]
    skipped = tuple(masked.get("skiplist_words") or ())
    prompts = settings.get("prompts") or {}
    query, document = (
        Side(
            str(prompts.get(role) or ""),
            max_tokens=_count(own, f"{role}_length"),
            skipped=skipped if role in tasks else (),
        )
        for role in ("query", "document")
    )
    return LateInteraction(query, document, _expansion(own.get("query_expansion")), is_mean=_is_mean(settings))


def _expansion(stated: Any) -> Expansion | None:
    if stated is None:
        return None
    if not isinstance(stated, dict) or stated.get("strategy", "fixed") not in ("fixed", "min"):
        raise CheckpointError(f"query_expansion {stated!r} is not supported")
    return Expansion(
        positive_int(stated, "length", QUERY_TOKENS),
        stated.get("strategy", "fixed") == "fixed",
        stated.get("token"),
        bool(stated.get("attend")),
    )


def _is_mean(settings: Mapping[str, Any]) -> bool:
    return settings.get("similarity_fn_name") == "meanmaxsim"


def _count(source: dict[str, Any], key: str) -> int | None:
    return None if source.get(key) is None else positive_int(source, key, None)
