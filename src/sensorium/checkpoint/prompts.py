"""Prompts that an embedder was trained with: texts before a query or a document, by name. Torch-free.

sentence-transformers keeps them in `config_sentence_transformers.json`. A request chooses one by its name or by what
its texts are (`input_type`, in the words of the services that have it); without a choice the default stands before
every text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from sensorium.errors import CheckpointError, RequestError

Role = Literal["query", "document"]

_NAMES: Mapping[Role, tuple[str, ...]] = {
    "query": ("query", "search_query", "question", "retrieval.query"),
    "document": ("document", "passage", "corpus", "search_document", "retrieval.passage"),
}
"""Names of one thing in different repositories and services, in the order in which they are looked for."""
_OTHER_TYPES = ("classification", "clustering", "sts", "semantic_similarity", "text-matching", "separation")
_INSTRUCT = re.compile(r"(Instruct: ?).*?(\n *Query: ?)", re.DOTALL)
_FILE = "config_sentence_transformers.json"


def role_of(input_type: str | None) -> Role | None:
    """Which side of a comparison a type of texts is, in any service's words."""
    wanted = (input_type or "").casefold()
    return next((role for role, names in _NAMES.items() if wanted in names), None)


@dataclass(frozen=True, slots=True)
class TextPrompts:
    """`texts` by name; `default_name` is one of them or None."""

    texts: Mapping[str, str] = field(default_factory=dict)
    default_name: str | None = None
    adapters: tuple[str, ...] = ()  # of the model's weights: some names choose one of them too

    @property
    def default(self) -> str:
        return "" if self.default_name is None else self.texts[self.default_name]

    def chosen(self, prompt_name: str | None, input_type: str | None) -> str:
        """What stands before a request's texts, whose prompt one of the two chooses; RequestError for names that the
        model does not have."""
        if prompt_name is not None:
            return self._named(prompt_name)
        return self.default if input_type is None else self._of_type(input_type)

    def of(self, role: Role) -> str:
        """What stands before one side of a comparison; nothing where the model has no prompt for it."""
        found = self._find(_NAMES[role])
        return "" if found is None else found

    def adapter(self, prompt_name: str | None, input_type: str | None) -> int:
        """Number of the adapter that `chosen`'s texts are computed with, from 1 on; 0: none."""
        if input_type is None:
            return self._adapter((prompt_name or self.default_name or "",))
        wanted = input_type.casefold()
        return self._adapter((wanted, *next((names for names in _NAMES.values() if wanted in names), ())))

    def adapter_of(self, role: Role) -> int:
        """The same for one side of a comparison."""
        return self._adapter(_NAMES[role])

    def _adapter(self, names: tuple[str, ...]) -> int:
        return next((self.adapters.index(name) + 1 for name in names if name in self.adapters), 0)

    def instructed(self, instruction: str) -> str:
        """What stands before a query where the task is told by the request. RequestError if the model's prompt for
        queries is not of the kind that tells one."""
        match = _INSTRUCT.fullmatch(self.of("query"))
        if match is None:
            raise RequestError(
                "`instruction`: this model's queries have no place for one (a prompt of the form 'Instruct: ... "
                "Query:'). Leave it out, or put it before the query yourself.",
                param="instruction",
                code="unsupported_field",
            )
        return match[1] + instruction + match[2]

    def _named(self, name: str) -> str:
        if name not in self.texts:
            raise RequestError(
                f"This model has no prompt {name!r}. {self._listed()}", param="prompt_name", code="unknown_prompt"
            )
        return self.texts[name]

    def _of_type(self, input_type: str) -> str:
        wanted = input_type.casefold()
        role = next((role for role, names in _NAMES.items() if wanted in names), None)
        found = self._find((wanted, *(_NAMES[role] if role else ())))
        if found is not None:
            return found
        known = role is not None or wanted in _OTHER_TYPES
        if known and (role == "document" or not any(self.texts.values())):
            return ""  # documents are bare in most models, and a model without prompts tells nothing apart
        kinds = ", ".join((*_NAMES["query"], *_NAMES["document"], *_OTHER_TYPES))
        said = f"has no prompt for the input_type {input_type!r}" if known else f"knows no input_type {input_type!r}"
        raise RequestError(
            f"This model {said} (known: {kinds}). {self._listed()}", param="input_type", code="unknown_input_type"
        )

    def _find(self, names: tuple[str, ...]) -> str | None:
        by_name = {name.casefold(): text for name, text in self.texts.items()}
        return next((by_name[name] for name in names if name in by_name), None)

    def _listed(self) -> str:
        if not self.texts:
            return "It has none; leave the field out."
        return f"It has: {', '.join(self.texts)}."


def adapter_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The adapters of jina-embeddings-v3's weights, in the order in which they are stored; config.json names them."""
    names = config.get("lora_adaptations") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError("config.json: lora_adaptations must be a list of names")
    return tuple(names)


def read_prompts(folder: Path, config: Mapping[str, Any] = MappingProxyType({})) -> TextPrompts:
    """The prompts of a model folder, which `config` (config.json) may have too. CheckpointError says in one line what
    is wrong with the file."""
    found = _read_file(folder)
    instructions = config.get("task_instructions")
    if not found.texts and isinstance(instructions, dict):
        found = replace(found, texts={str(name): str(text or "") for name, text in instructions.items()})
    return replace(found, adapters=adapter_names(config))


def _read_file(folder: Path) -> TextPrompts:
    path = folder / _FILE
    if not path.is_file():
        return TextPrompts()
    try:
        settings: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{_FILE} cannot be read: {error}") from None
    prompts = settings.get("prompts") if isinstance(settings, dict) else None
    texts = {} if prompts is None else prompts
    if not isinstance(texts, dict) or not all(isinstance(text, str | None) for text in texts.values()):
        raise CheckpointError(f"{_FILE}: 'prompts' must be an object of texts")
    default = settings.get("default_prompt_name") if isinstance(settings, dict) else None
    if default is not None and default not in (*texts, *_NAMES):
        raise CheckpointError(
            f"{_FILE}: default_prompt_name {default!r} is none of its prompts ({', '.join(texts) or 'there are none'})"
        )
    named = {name: text or "" for name, text in texts.items()}
    return TextPrompts(named if default is None else {default: "", **named}, default)
