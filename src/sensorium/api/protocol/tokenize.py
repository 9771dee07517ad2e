"""The bodies of POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sensorium.api.protocol.chat import ProcessorKwargs, TemplateFields, TemplateKwargs
from sensorium.api.protocol.common import Body, Name, Text, TokenId
from sensorium.api.protocol.content import Conversation, Messages, conversation
from sensorium.api.protocol.tools import MAX_TOOLS, ToolChoiceField, ToolEntry, ToolFields
from sensorium.config import Limits, ServerConfig
from sensorium.errors import RequestError
from sensorium.types import Modality


class TokenizeRequest(Body, TemplateFields, ToolFields):
    """Either `prompt` or `messages`."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Text | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_effort: Name | None = None
    enable_thinking: bool | None = None
    mm_processor_kwargs: ProcessorKwargs | None = None
    tools: Annotated[list[ToolEntry], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None

    def check(self, server: ServerConfig) -> None:
        self.check_template(server)
        self.check_tools()
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("Exactly one of `prompt` and `messages` is needed.", param="prompt")

    def conversation(self, modalities: frozenset[Modality], limits: Limits) -> Conversation:
        return conversation(self.messages or (), modalities, limits)


class DetokenizeRequest(Body):
    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**22)]
