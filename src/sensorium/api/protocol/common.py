"""What all request bodies share: strictness, bounds, and what happens to fields that we do not have.

Unknown fields are ignored and logged once per name. Fields that clients of other servers know and that would change
the answer are refused by name, unless they carry the value that changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema

from sensorium.api.protocol.other_servers import EVERYWHERE, IGNORED, Foreign
from sensorium.errors import UnsupportedFieldError
from sensorium.types import INT32_MAX

log = logging.getLogger("sensorium.api")

MAX_TEXT_CHARS = 2**24

RequestId = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:\-]+$")]
Name = Annotated[str, Field(max_length=256)]
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
Count = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
Priority = Annotated[int, Field(ge=-(2**31), le=INT32_MAX)]


def _fail_fast(schema: Any) -> None:
    """Mark every list in a core schema, wherever it stands."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _fail_fast(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class FailsFast(BaseModel):
    """Validation of a list ends at its first bad entry: only one is reported, and each that is found costs memory."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema


class Body(FailsFast):
    """A request body. Strict: no number is read from a string, no truth from a number, no NaN.

    What checks it is built for its first request (10 ms): for all of them, a start would take a tenth longer."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, frozen=True, protected_namespaces=(), defer_build=True
    )
    foreign: ClassVar[Mapping[str, Foreign]] = EVERYWHERE

    request_id: RequestId | None = None  # the client's own name of this request

    def check_fields(self, unknown: UnknownFields) -> None:
        """Refuse what would silently be missing from the answer; note the rest."""
        for name, value in (self.model_extra or {}).items():
            if name in self.foreign:
                if not self.changes_nothing(name, value):
                    known = self.foreign[name]
                    raise UnsupportedFieldError(
                        f"`{name}` is not supported by this server: {known.advice}.", param=name, code=known.code
                    )
            elif name not in IGNORED:
                unknown.note(name)

    def changes_nothing(self, name: str, value: Any) -> bool:
        """May a foreign field be there with this value?"""
        return self.foreign[name].allows(value)


class Nested(FailsFast):
    """An object inside a body. What it brings beyond its fields is ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True, defer_build=True)


class UnknownFields:
    """Remembers which unknown names were logged, up to a number: a client must not fill the log or the memory."""

    def __init__(self, max_names: int = 256) -> None:
        self._seen: set[str] = set()
        self._max_names = max_names

    def note(self, name: str) -> None:
        short = name[:64]
        if short in self._seen or len(self._seen) >= self._max_names:
            return
        self._seen.add(short)
        log.warning("unknown request field %r is ignored", short)
