"""How to choose tokens and what to make of states, in the names of vLLM's classes.

What is left open is what the model's `generation_config.json` says, as over HTTP. Values are checked when they are
used, by the same rules as a request's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sensorium import types
from sensorium.serving.sequences import PromptChoice
from sensorium.types import PoolingTask

_SAID_DIFFERENTLY = frozenset({"logprobs", "logit_bias"})
"""Fields that requests write in another form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """`max_tokens` left open is 16 for `generate` and the rest of the context for `chat`. `logprobs` is how many
    alternatives are told beside each token. `structured_outputs` holds an answer to a form: one of `json`, `regex`,
    `choice`, `grammar` and `structural_tag`, as in requests."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: Mapping[str, Any] | None = None

    def fields_of_request(self) -> dict[str, Any]:
        """What a request says in the same words; `logprobs`, for which chats and texts have other ones, is left out."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _SAID_DIFFERENTLY}
        if self.logit_bias is not None:
            found["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """A LoRA adapter by its name; `lora_path`, a folder as PEFT saves it or a hub id, is loaded where the name is new.
    `lora_int_id` is taken as vLLM has it, and means nothing here: a name is one adapter."""

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """`dimensions` cuts embeddings of models that were trained for it. `use_activation`: normalise embeddings, or make
    probabilities of a classifier's numbers; None: as the model says. `prompt_name` chooses one of the prompts that the
    model's files have (sentence-transformers'), which stands before texts; `input_type` chooses it by what the texts
    are (query, document, ...), and how a model of late interaction writes them."""

    dimensions: int | None = None
    use_activation: bool | None = None
    prompt_name: str | None = None
    input_type: str | None = None
    truncate_prompt_tokens: int | None = None

    def of(self, task: PoolingTask) -> types.PoolingParams:
        """For the engine. An embedding's activation is its normalisation."""
        if task in ("embed", "token_embed"):
            return types.PoolingParams(task, normalize=self.use_activation, dimensions=self.dimensions)
        return types.PoolingParams(task, activation=self.use_activation)

    def choice(self) -> PromptChoice:
        """RequestError if two fields choose a prompt."""
        param = next((name for name in ("prompt_name", "input_type") if getattr(self, name) is not None), None)
        return PromptChoice(self.prompt_name, self.input_type, param)
