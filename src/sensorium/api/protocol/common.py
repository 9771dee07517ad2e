"""What all request bodies share: strictness, bounds, and what happens to fields that we do not have.

Unknown fields are ignored and logged once per name. Fields that clients of other servers know and that would change
the answer are refused by name, unless they carry the value that changes nothing.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from sensorium.errors import UnsupportedFieldError

log = logging.getLogger("sensorium.api")

INT32_MAX = 2**31 - 1
MAX_TEXT_CHARS = 2**24

Name = Annotated[str, Field(max_length=256)]
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
Count = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
Priority = Annotated[int, Field(ge=-(2**31), le=INT32_MAX)]

NOTHING: tuple[Any, ...] = (None, False, "", [], {})
"""Values of a field that we do not have which still ask for nothing."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": NOTHING,
    "audio": NOTHING,
    "bad_words": NOTHING,
    "best_of": (None, 1),
    "documents": NOTHING,
    "ec_transfer_params": NOTHING,
    "function_call": (None, "none", "auto"),
    "functions": NOTHING,
    "guided_choice": NOTHING,
    "guided_decoding_backend": (None,),
    "guided_grammar": NOTHING,
    "guided_json": (None,),
    "guided_regex": NOTHING,
    "guided_whitespace_pattern": (None,),
    "kv_transfer_params": NOTHING,
    "length_penalty": (None, 1, 1.0),
    "logprob_token_ids": NOTHING,
    "media_io_kwargs": NOTHING,
    "modalities": (None, [], ["text"]),
    "prediction": NOTHING,
    "prompt_embeds": NOTHING,
    "prompt_logprobs": (None, False),
    "reasoning_effort": (None, "none"),
    "repetition_detection": NOTHING,
    "response_format": (None, {"type": "text"}),
    "return_mm_kwargs": NOTHING,
    "return_prompt_text": NOTHING,
    "return_token_ids": NOTHING,
    "return_token_offsets": NOTHING,
    "return_tokens_as_token_ids": NOTHING,
    "spaces_between_special_tokens": (None, True),
    "stream_interval": (None, 1),
    "structured_outputs": NOTHING,
    "suffix": NOTHING,
    "thinking_token_budget": (None,),
    "tool_choice": (None, "none", "auto"),
    "tools": NOTHING,
    "truncate_prompt_tokens": (None,),
    "truncation_side": (None,),
    "use_beam_search": NOTHING,
    "vllm_xargs": NOTHING,
    "watermarking": NOTHING,
    "web_search_options": NOTHING,
}
"""Field -> the values with which it may be there all the same."""

IGNORED = frozenset({
    "include_reasoning", "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "request_id",
    "safety_identifier", "service_tier", "session_id", "store", "verbosity"})
"""Fields that clients send and that change nothing here."""


class Body(BaseModel):
    """A request body. Strict: no number is read from a string, no truth from a number, no NaN."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True, protected_namespaces=())
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = UNSUPPORTED

    def check_fields(self, unknown: UnknownFields) -> None:
        """Refuse what would silently be missing from the answer; note the rest."""
        for name, value in (self.model_extra or {}).items():
            harmless = self.unsupported.get(name)
            if harmless is not None:
                if not any(value is known or (type(value) is type(known) and value == known) for known in harmless):
                    raise UnsupportedFieldError(f"`{name}` is not supported by this server; leave it out.", param=name)
            elif name not in IGNORED:
                unknown.note(name)


class Nested(BaseModel):
    """An object inside a body. What it brings beyond its fields is ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class UnknownFields:
    """Remembers which unknown names were logged, up to a number: a client must not fill the log or the memory."""

    def __init__(self, max_names: int = 256) -> None:
        self._seen: set[str] = set()
        self._max_names = max_names

    def note(self, name: str) -> None:
        short = name[:64]
        if short in self._seen or len(self._seen) >= self._max_names:
            return
        self._seen.add(short)
        log.warning("unknown request field %r is ignored", short)
