"""Messages -> what the checkpoint's Jinja chat template is given, and what its text becomes.

What users wrote is escaped before the template sees it, so that control tokens in the result are the template's own.
The template itself runs elsewhere (`inspection.Renderer`).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sensorium.checkpoint.chat_templates import CHATML, CHATML_TOKENS
from sensorium.checkpoint.families import family_of
from sensorium.errors import RequestError, StartupError, UnsupportedModalityError
from sensorium.prompt import builtin
from sensorium.prompt.inspection import (
    GLOBALS,
    MAX_SOURCE_CHARS,
    Inspection,
    TemplateExhausted,
    TemplateFailed,
    TemplateInvalid,
    TemplateRefused,
)
from sensorium.prompt.literals import CUT, escape_deep
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.prompt.thinking import thinking_variables
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.prompt.tools import ToolStyle, in_style, style_of, tool_probes
from sensorium.types import Modality

Placeholder = Callable[[Modality, int], str]
Content = str | list[dict[str, Any]]

MAX_KWARG_CHARS = 4096
RESERVED = frozenset(
    {
        *GLOBALS,
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "template",
        "tokenize",
        "tokenizer",
        "add_generation_prompt",
        "continue_final_message",
        "add_special_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "self",
        "caller",
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
        "cls_token",
        "mask_token",
    }
)
# What these write is the developer's or the model's: `<think>` and `<tool_call>` are there for the template to find.
_OWN_ROLES = frozenset({"system", "developer", "assistant"})
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_PROBE = "Probe7f3a"


class ChatTemplate:
    """A template and what is known of it. `modalities` are those whose parts the processor understands in
    `placeholder`'s words."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        inspection: Inspection,
        *,
        modalities: Iterable[Modality] = (),
        placeholder: Placeholder | None = None,
    ) -> None:
        """`inspection` is of the probes of these modalities, in `probes_of`'s order."""
        modalities = tuple(modalities)
        self.source = source
        self.free_names = frozenset(inspection.free_names)
        self._placeholder = placeholder
        outputs = iter(inspection.outputs)
        self.takes_strings = _echoes(next(outputs))
        self.takes_parts = _echoes(next(outputs))
        if not self.takes_parts:
            self.takes_strings = True
        self._media_parts: dict[Modality, dict[str, Any]] = {}
        for kind in modalities:
            # The first content part for which the template writes the processor's placeholder.
            for part, output in zip(_parts_of(kind), outputs, strict=False):
                if placeholder is not None and self.takes_parts and placeholder(kind, 0) in output:
                    self._media_parts.setdefault(kind, part)
        self.tool_style = self._found_style(modalities, outputs)
        told = self.tool_style.told
        texts = (*inspection.texts, *(() if told is None else told.marks))
        control = [token for token in tokenizer.added_tokens if any(token in text for text in texts)]
        self._tokenizer = tokenizer.with_literals(control)

    def _found_style(self, modalities: Sequence[Modality], outputs: Iterator[str]) -> ToolStyle:
        style = style_of(self.source, outputs, takes_strings=self.takes_strings)
        tried = [(kind, part) for kind in modalities for part in _parts_of(kind)]
        media = {
            kind
            for (kind, part), output in zip(tried, outputs, strict=False)
            if self._placeholder is not None
            and self._media_parts.get(kind) == part
            and self._placeholder(kind, 0) in output
        }
        return replace(style, media=frozenset(media))

    def variables(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> bytes:
        """What `Renderer.render` takes, untrusted text escaped for `Tokenizer.encode`. kwargs that the template does
        not read are left out. `tools` and calls in messages are as OpenAI writes them."""
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt cannot both be true.", param="continue_final_message"
            )
        if not messages:
            raise RequestError("A chat needs at least one message.", param="messages")
        given = self._checked_kwargs(thinking_variables(kwargs or {}, self.free_names, self.source))
        messages, tools = in_style(messages, tools, self.tool_style)
        seen: Counter[Modality] = Counter()
        chat = [self._message(message, index, seen) for index, message in enumerate(messages)]
        if continue_final_message:
            chat[-1]["content"] = _with_cut(chat[-1]["content"])
        return json.dumps(
            {
                "documents": None,
                **self._tokenizer.named_tokens,
                **given,
                "messages": chat,
                "tools": escape_deep(tools, self._tokenizer.escape),
                "add_generation_prompt": add_generation_prompt,
            }
        ).encode()

    def cut(self, text: str) -> str:
        """A rendered text up to the end of the final message, which is to be continued."""
        at = text.rfind(CUT)
        if at < 0:
            raise RequestError(
                "The model's chat template leaves the final message out, so it cannot be continued.",
                param="continue_final_message",
            )
        return text[:at] if text.startswith(f"{CUT} ", at) else text[:at].rstrip()

    def unread(self, kwargs: Mapping[str, Any]) -> list[str]:
        """Names that mean nothing to this template."""
        told = thinking_variables(kwargs, self.free_names, self.source)
        return [name for name in told if name not in self.free_names]

    def _checked_kwargs(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        for name, value in kwargs.items():
            param = f"chat_template_kwargs.{name[:64]}"
            if name in RESERVED:
                known = ", ".join(sorted(self.free_names - RESERVED)) or "none"
                raise RequestError(
                    f"'{name}' is not the request's to set (the chat template takes: {known}).", param=param
                )
            if not isinstance(value, str | int | float | bool | None):
                raise RequestError(f"'{name}' must be a string, a number, true, false or null.", param=param)
            if isinstance(value, float) and not math.isfinite(value):
                raise RequestError(f"'{name}' must be a finite number.", param=param)
            if isinstance(value, str) and len(value) > MAX_KWARG_CHARS:
                raise RequestError(f"'{name}' is longer than {MAX_KWARG_CHARS} characters.", param=param)
        read = {name: value for name, value in kwargs.items() if name in self.free_names}
        escaped = escape_deep(read, self._tokenizer.escape)
        return escaped if isinstance(escaped, dict) else {}

    def _escape_for(self, role: str) -> Callable[[str], str]:
        if role in _OWN_ROLES:
            return lambda text: self._tokenizer.escape(text, special_only=True)
        return self._tokenizer.escape

    def _message(self, message: Message, index: int, seen: Counter[Modality]) -> dict[str, Any]:
        if not _ROLE.fullmatch(message.role):
            raise RequestError("This role is not a name.", param=f"messages[{index}].role")
        escape = self._escape_for(message.role)
        extra = escape_deep(message.extra, escape)
        found: dict[str, Any] = dict(extra) if isinstance(extra, dict) else {}
        if message.name is not None:
            found["name"] = escape(message.name)
        found["role"] = message.role
        found["content"] = self._content(message.content, escape, seen)
        told, calls = self.tool_style.told, found.get("tool_calls")
        if told is not None and calls:
            found["content"] = _with_text(found["content"], told.calls(calls))
        return found

    def _content(
        self, parts: Sequence[TextPart | MediaPart], escape: Callable[[str], str], seen: Counter[Modality]
    ) -> Content:
        kinds = [part.kind for part in parts if isinstance(part, MediaPart)]
        if self.takes_parts and all(kind in self._media_parts for kind in kinds):
            if self.takes_strings and not kinds and len(parts) <= 1:
                return self._flat(parts, escape, seen)
            seen.update(kinds)
            return [
                {"type": "text", "text": escape(part.text)}
                if isinstance(part, TextPart)
                else dict(self._media_parts[part.kind])
                for part in parts
            ]
        flat = self._flat(parts, escape, seen)
        return flat if self.takes_strings else [{"type": "text", "text": flat}]

    def _flat(
        self, parts: Sequence[TextPart | MediaPart], escape: Callable[[str], str], seen: Counter[Modality]
    ) -> str:
        """For templates that know only strings: parts in order, one a line, a media item as its placeholder."""
        lines = []
        for part in parts:
            if isinstance(part, TextPart):
                lines.append(escape(part.text))
            elif self._placeholder is None:
                raise UnsupportedModalityError(part.kind, param="messages")
            else:
                lines.append(self._placeholder(part.kind, seen[part.kind]))
                seen[part.kind] += 1
        return "\n".join(lines)


# What a template understands is found out by trying, once.


def probes_of(modalities: Iterable[Modality], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Variables whose rendering tells what a template takes: a string, a text part, each modality's parts, tools."""
    modalities = tuple(modalities)
    text = {"type": "text", "text": _PROBE}
    contents: list[Content] = [_PROBE, [text]]
    parts = [part for kind in modalities for part in _parts_of(kind)]
    contents += [[part, text] for part in parts]
    chats = [
        {
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            "messages": [{"role": "user", "content": content}],
        }
        for content in contents
    ]
    return [{**tokenizer.named_tokens, **chat} for chat in (*chats, *tool_probes(parts))]


def _parts_of(kind: Modality) -> list[dict[str, Any]]:
    """How content parts of this modality may be written; templates know some of these."""
    return [{"type": kind}, *({"type": name, name: ""} for name in (kind, f"{kind}_url", f"input_{kind}"))]


def _echoes(output: str) -> bool:
    """Whether the probe's text came out as text (a list that is printed as Python writes it does not count)."""
    return _PROBE in output and f"'{_PROBE}'" not in output and f'"{_PROBE}"' not in output


@contextmanager
def rendering() -> Iterator[None]:
    """What can happen to a request's messages in a template, in the words of the API."""
    try:
        yield
    except TemplateRefused as refusal:
        words = " ".join(str(refusal).split())[:500]
        raise RequestError(
            f"The model's chat template refuses these messages: {words}", param="messages", code="chat_template_refused"
        ) from None
    except TemplateExhausted:
        raise RequestError(
            "The model's chat template takes more time or memory for these messages than it may.",
            param="messages",
            code="chat_template_failed",
        ) from None
    except TemplateFailed:
        raise RequestError(
            "The model's chat template cannot render these messages.", param="messages", code="chat_template_failed"
        ) from None


@contextmanager
def compiling() -> Iterator[None]:
    """The same while a template is looked at first: StartupError."""
    try:
        yield
    except TemplateInvalid as error:
        raise StartupError(f"The chat template is not valid Jinja: {str(error)[:300]}") from None
    except TemplateExhausted:
        raise StartupError("The chat template takes more time or memory than it may, for one short message.") from None
    except TemplateFailed:
        raise StartupError("The chat template cannot be compiled.") from None


def check_source(source: str) -> None:
    if len(source) > MAX_SOURCE_CHARS:
        raise StartupError(f"The chat template is longer than {MAX_SOURCE_CHARS} characters.")


def _with_text(content: Content, text: str) -> Content:
    """Content with a text on a line of its own behind it."""
    if isinstance(content, str):
        return f"{content}\n{text}" if content else text
    said = [part for part in content if part.get("text") != ""]
    return [*said, {"type": "text", "text": f"\n{text}" if said else text}]


def _with_cut(content: Content) -> Content:
    """A mark after the message's last text; the space tells whether the template trims what it is given."""
    if isinstance(content, str):
        return f"{content}{CUT} "
    texts = [index for index, part in enumerate(content) if part["type"] == "text"]
    if not texts:
        raise RequestError("The final message has no text to continue.", param="messages")
    parts = list(content)
    parts[texts[-1]] = {"type": "text", "text": f"{parts[texts[-1]]['text']}{CUT} "}
    return parts


def template_source(
    flag: str | None, checkpoint_template: str | None, architecture: str, tokenizer: Tokenizer
) -> str | None:
    """The operator's template, else the checkpoint's, else one that suits the architecture or the tokenizer."""
    if flag is not None:
        return _from_flag(flag)
    if checkpoint_template is not None:
        return checkpoint_template
    if (default := family_of(architecture).chat_template) is not None:
        return default
    return CHATML if all(token in tokenizer.added_tokens for token in CHATML_TOKENS) else None


def pooling_template_source(flag: str | None, names: Iterable[str]) -> str | None:
    """The template for embeddings, where the model has its own for them and the operator says nothing else."""
    return builtin.pooling_template_of(names) if flag is None else None


def _from_flag(flag: str) -> str:
    """`--chat-template`: what has braces or several lines is the template itself, anything else a file or a name."""
    if any(character in flag for character in "{}\n"):
        return flag
    known = builtin.named_template(flag)
    file = Path(os.path.expanduser(flag))  # noqa: PTH111 - Path's raises without a home
    if known is not None and not file.is_file():
        return known
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise StartupError(f"--chat-template: the file {flag} cannot be read: {reason}") from None
