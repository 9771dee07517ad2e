"""Rerankers that are language models: which tokens' logits make the score, and how a pair is written. Torch-free.

Such a model is published with its whole language head, of which one or two rows are read. The folder says so in the
files of sentence-transformers (`LogitScore`), config.json or --hf-overrides in vLLM's words (`classifier_from_token`),
or it is known by its name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensorium.checkpoint import pair_templates
from sensorium.checkpoint.known_names import known
from sensorium.checkpoint.tokens import read_vocabulary
from sensorium.checkpoint.values import read_json
from sensorium.errors import CheckpointError

_log = logging.getLogger("sensorium")
_DIFFERENCE, _LOGITS = "from_2_way_softmax", "no_post_processing"  # vLLM's words for `method`


@dataclass(frozen=True, slots=True)
class ScoreTokens:
    """The scores are the logits of `kept`, less the logit of `subtracted` if there is one: the log-odds of two."""

    kept: tuple[int, ...]
    subtracted: int | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a published family of rerankers is read. `tokens`: the one that means no, if its
    logit counts, and the one that means yes."""

    tokens: tuple[str, ...]
    template: str


_QWEN3 = Recipe(("no", "yes"), pair_templates.QWEN3_RERANKER)
_QWEN3_VL = Recipe(("no", "yes"), pair_templates.QWEN3_VL_RERANKER)
RECIPES: Mapping[str, Recipe] = {
    "qwen3-reranker": _QWEN3,
    "qwen3-vl-reranker": _QWEN3_VL,
    "bge-reranker-v2-gemma": Recipe(("Yes",), pair_templates.BGE_GEMMA),
    "mxbai-rerank-base-v2": Recipe(("0", "1"), pair_templates.MXBAI_RERANK),
    "mxbai-rerank-large-v2": Recipe(("0", "1"), pair_templates.MXBAI_RERANK),
}
"""By a part of the model's name."""


def recipe_of(folder: Path, config: Mapping[str, Any]) -> Recipe | None:
    """The recipe of a folder of a known name (also in the hub's cache), or of a config that is said to be Qwen's."""
    if config.get("is_original_qwen3_reranker") is True:
        return _QWEN3_VL if "vision_config" in config else _QWEN3
    return known(folder, RECIPES)


def score_tokens(folder: Path, config: Mapping[str, Any], recipe: Recipe | None) -> ScoreTokens | None:
    """The tokens whose logits are the score; None where nothing says that there are any.

    CheckpointError if what is said of them is wrong, or the tokenizer lacks one. A folder that is a reranker by nothing
    but its name, and lacks one, is served as what it is.
    """
    stated = config.get("classifier_from_token")
    if stated is None and (saved := _saved(folder)) is not None:
        return saved
    if stated is None and recipe is None:
        return None
    words: Any = stated if stated is not None else recipe and recipe.tokens
    if not isinstance(words, list | tuple) or not all(isinstance(one, str) for one in words):
        raise CheckpointError(f"classifier_from_token must be a list of tokens, not {words!r}")
    method = config.get("method") or (_DIFFERENCE if len(words) == 2 else _LOGITS)
    if method not in (_DIFFERENCE, _LOGITS):
        raise CheckpointError(f"method {method!r} is not supported; supported are {_DIFFERENCE} and {_LOGITS}")
    if not words or (method == _DIFFERENCE and len(words) != 2):
        raise CheckpointError(
            f"classifier_from_token names {len(words)} tokens; {method} needs "
            + ("two: the one that means no, then the one that means yes" if method == _DIFFERENCE else "some")
        )
    vocabulary = read_vocabulary(folder)
    missing = [word for word in words if word not in vocabulary]
    if missing and stated is None and config.get("is_original_qwen3_reranker") is not True:
        _log.warning(
            "%s is called like a reranker, but its tokenizer has no %s: it is served as a model that generates",
            folder.name,
            " or ".join(map(repr, words)),
        )
        return None
    if missing:
        raise CheckpointError(f"the tokenizer has no token {missing[0]!r}")
    ids = tuple(vocabulary[word] for word in words)
    return ScoreTokens(ids[1:], ids[0]) if method == _DIFFERENCE else ScoreTokens(ids)


def _saved(folder: Path) -> ScoreTokens | None:
    """What a `LogitScore` module of sentence-transformers says."""
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
    except (OSError, ValueError):
        return None  # whoever reads the pooling says what is wrong with it
    for module in modules if isinstance(modules, list) else []:
        if isinstance(module, dict) and str(module.get("type")).rpartition(".")[2] == "LogitScore":
            settings = read_json(folder / str(module.get("path", "")) / "config.json") or {}
            yes, no = settings.get("true_token_id"), settings.get("false_token_id")
            if not isinstance(yes, int) or not isinstance(no, int | None):
                raise CheckpointError(f"{module.get('path')}/config.json: true_token_id and false_token_id must be ids")
            return ScoreTokens((yes,), no)
    return None
