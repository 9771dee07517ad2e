"""Which member of a union a value is meant to be. Tags stand in angle brackets: they are no part of a field's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Discriminator


def kind_of(value: Any) -> str | None:
    """A value's `type`, if it has one that is a string."""
    found = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return found if isinstance(found, str) else None


def by_type(tags: Mapping[str, str]) -> Discriminator:
    """By `type`, to the tag that it has here, else "<other>"."""
    return Discriminator(lambda value: tags.get(kind_of(value) or "", "<other>"))


def tags_of(kinds: str) -> dict[str, str]:
    """Names of types to tags of the same name."""
    return {kind: f"<{kind}>" for kind in kinds.split()}


TEXT_OR_OBJECT = Discriminator(lambda value: "<string>" if isinstance(value, str) else "<object>")
LIST_OR_TEXT = Discriminator(lambda value: "<list>" if isinstance(value, list) else "<string>")
