"""A chat that came in another API's form. That form was validated under its own names; nothing is validated again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from sensorium.api.protocol.chat import ChatRequest
from sensorium.api.protocol.content import Conversation
from sensorium.api.protocol.turns import system_first
from sensorium.config import Limits
from sensorium.errors import ServerError
from sensorium.prompt.forms import Form
from sensorium.serving.defaults import ModelDefaults
from sensorium.types import Modality, SamplingParams


class Conversational(Protocol):
    """Whatever a conversation can be made of."""

    def conversation(self, modalities: frozenset[Modality], limits: Limits) -> Conversation:
        """RequestError, with the client's own name of the field, for what is too much or what the model cannot take."""


class FormedChat(ChatRequest):
    """A chat whose answer is held to a form that a field of another API asked for."""

    _form: Form | None = None

    @classmethod
    def validated(cls, fields: Mapping[str, Any], form: Form | None) -> FormedChat:
        made = cls.model_validate(fields)
        made._form = form
        return made

    def form(self) -> Form | None:
        return self._form


class ForeignChat(FormedChat):
    """`source` has the messages. `most_tokens` is what an answer may have at most; where less fits, it has less."""

    _source: Conversational | None = None
    _most_tokens: int | None = None
    _system_first: bool = False

    @classmethod
    def of(
        cls, source: Conversational, *, most_tokens: int | None = None, form: Form | None = None, **fields: Any
    ) -> ForeignChat:
        """`fields` are those of a chat completion, each in the type that it has there."""
        made = cls.model_construct(messages=[], **fields)
        made._source = source
        made._most_tokens = most_tokens
        made._form = form
        return made

    def conversation(self, modalities: frozenset[Modality], limits: Limits) -> Conversation:
        if self._source is None:
            raise ServerError
        found = self._source.conversation(modalities, limits)
        return system_first(found) if self._system_first else found

    def with_system_first(self) -> ForeignChat:
        """The same for a template that takes system messages at the start only."""
        made = self.model_copy()
        made._system_first = True
        return made

    def without_messages(self) -> ForeignChat:
        made = self.model_copy()
        made._source = None
        return made

    def sampling(self, defaults: ModelDefaults, prompt_tokens: int) -> SamplingParams:
        most = self._most_tokens or defaults.max_new_tokens
        return super().sampling(replace(defaults, max_new_tokens=most), prompt_tokens)
