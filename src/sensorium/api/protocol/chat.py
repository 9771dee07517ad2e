"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from sensorium.api.protocol.common import Count, Name, Text
from sensorium.api.protocol.content import Conversation, Messages, conversation
from sensorium.api.protocol.other_servers import CHATS, Foreign
from sensorium.api.protocol.sampling import LogprobCount, SamplingBody, check_alternatives, check_answer_size
from sensorium.api.protocol.tools import MAX_TOOLS, ToolChoiceField, ToolEntry, ToolFields
from sensorium.config import Limits, ServerConfig
from sensorium.errors import NotAllowedError, RequestError
from sensorium.serving.defaults import ModelDefaults, completion_length
from sensorium.types import INT32_MAX, Modality, SamplingParams


def _scalars(value: dict[str, Any]) -> dict[str, Any]:
    """Template variables are plain values: nothing nested reaches the template engine."""
    for item in value.values():
        if isinstance(item, dict | list) or (isinstance(item, str) and len(item) > 4096):
            raise PydanticCustomError("own", "must hold only plain values: short strings, numbers, true, false, null")
    return value


Key = Annotated[str, Field(max_length=64)]
TemplateKwargs = Annotated[dict[Key, Any], Field(max_length=32), AfterValidator(_scalars)]
ProcessorKwargs = Annotated[dict[Key, Any], Field(max_length=32)]


class TemplateFields:
    """The fields by which a request reaches into template and processor; most are closed by default."""

    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    reasoning_effort: str | None  # this and the next are variables of templates that know them
    enable_thinking: bool | None
    mm_processor_kwargs: dict[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None

    def check_template(self, server: ServerConfig) -> None:
        if self.chat_template is not None and not server.allow_request_chat_template:
            raise NotAllowedError("chat_template", "--allow-request-chat-template")
        if self.mm_processor_kwargs and not server.allow_request_mm_kwargs:
            raise NotAllowedError("mm_processor_kwargs", "--allow-request-mm-kwargs")
        if self.continues and self.generates_prompt and self.add_generation_prompt is not None:
            raise RequestError(
                "`continue_final_message` and `add_generation_prompt` exclude each other.",
                param="continue_final_message",
            )

    @property
    def continues(self) -> bool:
        """Does the answer go on where the last message ends?"""
        return bool(self.continue_final_message)

    @property
    def generates_prompt(self) -> bool:
        """Does the assistant's turn begin after the last message? By default, unless that message is continued."""
        if self.add_generation_prompt is None:
            return not self.continues
        return self.add_generation_prompt

    @property
    def template_variables(self) -> dict[str, Any]:
        """Those that clients give as fields of their own, and those of `chat_template_kwargs`, which are exact."""
        own = {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.enable_thinking}
        return {name: value for name, value in own.items() if value is not None} | (self.chat_template_kwargs or {})

    def template_options(self) -> dict[str, Any]:
        """The options of `PromptBuilder.prepare_chat` that these fields are."""
        return {
            "add_generation_prompt": self.generates_prompt,
            "chat_template": self.chat_template,
            "continue_final_message": self.continues,
            "template_kwargs": self.template_variables,
            "mm_processor_kwargs": self.mm_processor_kwargs,
        }


class ChatRequest(SamplingBody, TemplateFields, ToolFields):
    foreign: ClassVar[Mapping[str, Foreign]] = CHATS

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Text | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_effort: Name | None = None
    enable_thinking: bool | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: Count | None = None
    mm_processor_kwargs: ProcessorKwargs | None = None
    tools: Annotated[list[ToolEntry], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None

    def check(self, limits: Limits, server: ServerConfig) -> None:
        self.check_limits(limits)
        self.check_template(server)
        self.check_tools()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("`top_logprobs` needs `logprobs`: true.", param="top_logprobs")
        check_alternatives(self.top_logprobs, limits, "top_logprobs")

    def conversation(self, modalities: frozenset[Modality], limits: Limits) -> Conversation:
        return conversation(self.messages, modalities, limits)

    @property
    def continues(self) -> bool:
        last = self.messages[-1] if self.messages else None
        return super().continues or (last is not None and last.role == "assistant" and bool(last.prefix))

    @property
    def length(self) -> int | None:
        """Tokens that a completion may have, where the request says it."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def without_messages(self) -> ChatRequest:
        """The same request without what it takes the most memory for."""
        return self.model_copy(update={"messages": [], "continue_final_message": self.continues or None})

    def sampling(self, defaults: ModelDefaults, prompt_tokens: int) -> SamplingParams:
        logprobs = defaults.alternatives(self.top_logprobs or 0, "top_logprobs") if self.logprobs else None
        default = defaults.max_new_tokens
        max_tokens = completion_length(defaults, prompt_tokens, self.length, default, self.choices, "messages")
        check_answer_size(logprobs, max_tokens * self.choices, "top_logprobs")
        return self.sampling_with(
            defaults, logprobs=logprobs, prompt_logprobs=self.scored(defaults, prompt_tokens), max_tokens=max_tokens
        )
