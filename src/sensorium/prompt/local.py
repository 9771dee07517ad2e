"""Templates that are known to be good, run in this process: for tools and tests. The server never imports this."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from sensorium.prompt import sandbox
from sensorium.prompt.inspection import Inspection, TemplateFailed, TemplateRefused
from sensorium.prompt.messages import Message
from sensorium.prompt.template import ChatTemplate, Placeholder, compiling, probes_of, rendering
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import Modality

FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


class LocalRenderer:
    """Implements `Renderer` without its bounds."""

    def __init__(self) -> None:
        self._environment = sandbox.new_environment()
        self._compiled = lru_cache(maxsize=8)(self._environment.from_string)

    def inspect_now(self, source: str, probes: Sequence[Mapping[str, Any]]) -> Inspection:
        return sandbox.inspect(self._environment, source, probes)

    async def inspect(self, source: str, probes: Sequence[Mapping[str, Any]], tenant: bytes) -> Inspection:
        return self.inspect_now(source, probes)

    async def render(self, source: str, variables: bytes, tenant: bytes, *, is_foreign: bool = False) -> str:
        return self.render_now(source, variables)

    def render_now(self, source: str, variables: bytes) -> str:
        try:
            return sandbox.render(self._compiled(source), json.loads(variables))
        except sandbox.TemplateRefusal as refusal:
            raise TemplateRefused(str(refusal)) from None
        except FAILURES:
            raise TemplateFailed from None

    async def aclose(self) -> None:
        pass


class LocalTemplate(ChatTemplate):
    """A chat template with its renderer."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        *,
        modalities: Iterable[Modality] = (),
        placeholder: Placeholder | None = None,
    ) -> None:
        self._renderer = LocalRenderer()
        modalities = tuple(modalities)
        with compiling():
            found = self._renderer.inspect_now(source, probes_of(modalities, tokenizer))
        super().__init__(source, tokenizer, found, modalities=modalities, placeholder=placeholder)

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """`options` are those of `ChatTemplate.variables`."""
        with rendering():
            text = self._renderer.render_now(self.source, self.variables(messages, **options))
        return self.cut(text) if options.get("continue_final_message") else text
