"""The bodies of /score and /rerank: texts, or contents of text and media, compared with one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from sensorium.api.protocol.common import Count, Text
from sensorium.api.protocol.items import InputItem, is_item
from sensorium.api.protocol.other_servers import COMPARED, Foreign
from sensorium.api.protocol.pooling import MAX_INPUTS, PoolingBody, TextOrItem
from sensorium.config import Limits, ServerConfig
from sensorium.errors import RequestError
from sensorium.prompt.encode import Side
from sensorium.types import PoolingParams

_FIELDS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))


def _items_form(value: Any) -> str:
    if isinstance(value, list):
        return "<many>"
    return "<item>" if is_item(value) else "<text>"


Many = Annotated[list[TextOrItem], Field(min_length=1, max_length=MAX_INPUTS)]
Items = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[InputItem, Tag("<item>")] | Annotated[Many, Tag("<many>")],
    Discriminator(_items_form),
]


class ComparingBody(PoolingBody):
    """Fields of both endpoints. Limits of tokens cut the texts before they are joined; 0 leaves them whole.
    `instruction` tells a model that reads one what makes a document relevant."""

    foreign: ClassVar[Mapping[str, Foreign]] = COMPARED

    instruction: Text | None = None
    max_tokens_per_query: Count | None = None
    max_tokens_per_doc: Count | None = None

    def params(self) -> PoolingParams:
        return PoolingParams("score", activation=self.use_activation)


class ScoreRequest(ComparingBody):
    """One of four pairs of names for the two sides."""

    queries: Items | None = None
    documents: Items | None = None
    items: Items | None = None
    data_1: Items | None = None
    data_2: Items | None = None
    text_1: Items | None = None
    text_2: Items | None = None

    def check(self, limits: Limits, server: ServerConfig) -> None:
        super().check(limits, server)
        left, right = self.sides
        for items, name in zip((left, right), self.names, strict=True):
            check_items(items, name, single=not isinstance(getattr(self, name), list))
        if len(left) != len(right) and len(left) != 1:
            raise RequestError(
                f"`{self.names[0]}` has {len(left)} entries and `{self.names[1]}` {len(right)}; they "
                "must be 1 and 1, 1 and N or N and N.",
                param=self.names[0],
            )

    @property
    def names(self) -> tuple[str, str]:
        """The fields in which the two sides were given."""
        given = tuple(
            name for name in dict.fromkeys(name for pair in _FIELDS for name in pair) if getattr(self, name) is not None
        )
        for pair in _FIELDS:
            if given == pair:
                return pair
        raise RequestError(
            "Give two sides to compare: `queries` and `documents` (or `items`), `data_1` and `data_2`, "
            "or `text_1` and `text_2`.",
            param=given[0] if given else "queries",
        )

    @property
    def sides(self) -> tuple[Sequence[str | InputItem], Sequence[str | InputItem]]:
        left, right = self.names
        return as_list(getattr(self, left)), as_list(getattr(self, right))


class RerankRequest(ComparingBody):
    """With `texts` it is text-embeddings-inference's, which has the last four fields."""

    query: TextOrItem
    documents: Many | None = None
    top_n: Count | None = None
    return_documents: bool | None = None
    texts: Many | None = None
    raw_scores: bool | None = None
    return_text: bool | None = None
    truncate: bool | None = None
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None

    def check(self, limits: Limits, server: ServerConfig) -> None:
        super().check(limits, server)
        if (self.documents is None) == (self.texts is None):
            raise RequestError(
                "`documents` is required." if self.texts is None else "Give `documents` or `texts`, not both.",
                param="documents",
                code="missing_required_parameter" if self.texts is None else None,
            )
        check_items([self.query], "query", single=True)
        check_items(self.items, self.items_name)

    @property
    def items(self) -> Sequence[str | InputItem]:
        return self.documents or self.texts or ()

    @property
    def items_name(self) -> str:
        return "documents" if self.texts is None else "texts"

    @property
    def most_tokens(self) -> int | None:
        return -1 if self.truncate else super().most_tokens

    @property
    def cut_side(self) -> Side | None:
        direction = (self.truncation_direction or "").lower()
        return "left" if direction == "left" else "right" if direction else super().cut_side

    def params(self) -> PoolingParams:
        return PoolingParams("score", activation=False if self.raw_scores else self.use_activation)


def as_list(given: Any) -> Sequence[str | InputItem]:
    return given if isinstance(given, list) else [given]


def check_items(items: Sequence[Any], name: str, *, single: bool = False) -> None:
    for index, item in enumerate(items):
        if plain_text(item) == "":
            where = name if single else f"{name}[{index}]"
            raise RequestError(f"`{where}` must not be empty.", param=where)


def plain_text(item: Any) -> str | None:
    """An item's text; None if it has media (or parts that we do not have)."""
    return item if isinstance(item, str) else item.plain


def is_plain(item: Any) -> bool:
    """Is it a text, which stands as it is before the model? The parts of a message go through the chat template."""
    return isinstance(item, str) or (item.content is None and item.plain is not None)
