"""Chat templates of a served model: the operator's or the checkpoint's, and those that requests bring."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from sensorium.config import ServerConfig
from sensorium.errors import NotAllowedError, RequestError, StartupError
from sensorium.processors.base import Processor
from sensorium.prompt.formats.base import OutputFormat
from sensorium.prompt.formats.detect import Evidence, described, find_format
from sensorium.prompt.inspection import Inspection, Renderer
from sensorium.prompt.template import ChatTemplate, check_source, compiling, probes_of, rendering
from sensorium.prompt.tokenizer import Tokenizer

MAX_REQUEST_TEMPLATE = 64 * 1024  # characters
MAX_UNREAD_NAMES = 256
_log = logging.getLogger("sensorium")


@dataclass(frozen=True, slots=True)
class OwnTemplates:
    """A model's. `chat` is None if it cannot chat until it is given one. `tools` is for chats that have tools,
    `pooling` for models that are embedded with other words than they chat with; None: as `chat`."""

    chat: ChatTemplate | None
    tools: ChatTemplate | None = None
    pooling: ChatTemplate | None = None

    def fitting(self, *, pooled: bool, has_tools: bool = False) -> ChatTemplate | None:
        return (self.pooling if pooled else self.tools if has_tools else None) or self.chat


class Templates:
    """`renderer` runs the templates."""

    def __init__(self, own: OwnTemplates, *, processor: Processor, renderer: Renderer, server: ServerConfig) -> None:
        self.own = own
        self._processor = processor
        self._renderer = renderer
        self._server = server
        self._unread_names: set[str] = set()  # that were told in the log

    async def find(self, source: str | None, tenant: bytes, *, pooled: bool, has_tools: bool = False) -> ChatTemplate:
        """The template of a request: `source` is what it brings, if anything."""
        if source is None:
            default = self.own.fitting(pooled=pooled, has_tools=has_tools)
            if default is None:
                raise RequestError(
                    "This model has no chat template. Start the server with --chat-template.",
                    param="messages",
                    code="no_chat_template",
                )
            return default
        if not self._server.allow_request_chat_template:
            raise NotAllowedError("chat_template", "--allow-request-chat-template")
        if len(source) > MAX_REQUEST_TEMPLATE:
            raise RequestError(
                f"chat_template is longer than {MAX_REQUEST_TEMPLATE} characters.", param="chat_template"
            )
        probes = probes_of(self._processor.modalities, self._processor.tokenizer)
        try:
            with compiling():
                found = await self._renderer.inspect(source, probes, tenant)
        except StartupError as error:
            raise RequestError(error.message, param="chat_template") from None
        return _chat_template(source, self._processor, found)

    def note_unread(self, names: Iterable[str]) -> None:
        """Say once per name that the template does not read it; a client must not fill the log or the memory."""
        for name in names:
            short = name[:64]
            if short not in self._unread_names and len(self._unread_names) < MAX_UNREAD_NAMES:
                self._unread_names.add(short)
                _log.warning("template variable %r is ignored: the chat template does not read it", short)

    async def render(self, template: ChatTemplate, variables: bytes, tenant: bytes, *, is_foreign: bool) -> str:
        with rendering():
            return await self._renderer.render(template.source, variables, tenant, is_foreign=is_foreign)

    async def aclose(self) -> None:
        await self._renderer.aclose()


def opened(source: str, processor: Processor, renderer: Renderer) -> ChatTemplate:
    """A template of the operator's. StartupError if it is none or takes too much."""
    check_source(source)
    with compiling():
        found = renderer.inspect_now(source, probes_of(processor.modalities, processor.tokenizer))
    return _chat_template(source, processor, found)


def format_of(
    template: ChatTemplate | None, tokenizer: Tokenizer, server: ServerConfig, response_template: object = None
) -> OutputFormat | None:
    """How the model writes calls and reasoning, as its template and vocabulary show it, the flags say, or the
    checkpoint's `response_template`. None if it does neither, or has no template. StartupError if a flag names no
    format."""
    if template is None:
        return None
    style = template.tool_style
    found = find_format(
        Evidence(
            tokens=tokenizer.added_tokens,
            special=tokenizer.special_ids,
            source=template.source,
            written=style.written,
            shows_tools=style.shows_tools,
            response_template=response_template,
        ),
        calls=server.tool_call_parser,
        thinking=server.reasoning_parser,
    )
    if found is not None:
        _log.info("output format: %s", described(found))
    return found


def _chat_template(source: str, processor: Processor, inspection: Inspection) -> ChatTemplate:
    tokenizer = processor.tokenizer.with_literals(processor.literals, special=True)
    return ChatTemplate(
        source, tokenizer, inspection, modalities=processor.modalities, placeholder=processor.placeholder
    )
