"""Chats of other APIs on their way: what is done for all of them that OpenAI's clients do for themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from sensorium.api.chat import Chat
from sensorium.api.generated import Asker
from sensorium.api.protocol.foreign_chat import ForeignChat
from sensorium.api.protocol.turns import has_late_system
from sensorium.errors import RequestError
from sensorium.serving.prompts import Prepared

Result = TypeVar("Result")


class TranslatedChat(Chat):
    """Answered by its subclass in the form in which it was asked."""

    def __init__(self, request: ForeignChat) -> None:
        super().__init__(request)
        self._asked = request

    async def prompt(self, work: Asker) -> Prepared:
        async def attempt(request: ForeignChat) -> Prepared:
            self.request = request
            return await super(TranslatedChat, self).prompt(work)

        asked, self._asked = self._asked, self._asked.without_messages()
        return await _prepared(work, asked, attempt)


async def count_tokens(work: Asker, request: ForeignChat) -> int:
    """Tokens of the prompt, however long; media are measured, not decoded."""

    async def attempt(request: ForeignChat) -> int:
        return await Chat(request).count(work)

    return await _prepared(work, request, attempt)


async def _prepared(work: Asker, request: ForeignChat, attempt: Callable[[ForeignChat], Awaitable[Result]]) -> Result:
    """System messages stay where they are if the template takes them there, so that a conversation that goes on finds
    its beginning in the cache; else they are one, at the start."""
    try:
        return await attempt(request)
    except RequestError as error:
        conversation = request.conversation(work.model.processor.modalities, work.limits)
        if error.code != "chat_template_refused" or not has_late_system(conversation):
            error.param = "messages" if error.param == "continue_final_message" else error.param
            raise
    return await attempt(request.with_system_first())
