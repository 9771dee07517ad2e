"""What is known of a chat template without running it here, and the ways in which one can fail. Imports no Jinja."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

MAX_SOURCE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 1 << 24
MAX_PROBE_CHARS = 1 << 16
GLOBALS = ("range", "dict", "namespace", "raise_exception", "strftime_now")
"""Names that a template finds beside its variables."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """`texts` is every piece of text that the template itself can write, `outputs` what it made of each probe ("" where
    it failed)."""

    free_names: tuple[str, ...]  # variables that it reads and does not set
    texts: tuple[str, ...]
    outputs: tuple[str, ...]


class TemplateRefused(Exception):
    """The template called `raise_exception` with these words: the messages do not suit the model."""


class TemplateFailed(Exception):
    """The template cannot render these variables."""


class TemplateInvalid(Exception):
    """The source is not a template; the words say why."""


class TemplateExhausted(TemplateFailed):
    """It takes more time or memory than a template may."""


class Renderer(Protocol):
    """Runs templates. `variables` is a JSON object. Every method may raise TemplateFailed."""

    def inspect_now(self, source: str, probes: Sequence[Mapping[str, Any]]) -> Inspection:
        """For templates of the operator's, before anything is served. TemplateInvalid if it is none."""

    async def inspect(self, source: str, probes: Sequence[Mapping[str, Any]], tenant: bytes) -> Inspection:
        """For templates of requests. TemplateInvalid if it is none."""

    async def render(self, source: str, variables: bytes, tenant: bytes, *, is_foreign: bool = False) -> str:
        """TemplateRefused if the template says so. `is_foreign`: the template came with the request."""

    async def aclose(self) -> None: ...
