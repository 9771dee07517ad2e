"""The body of Cohere's POST /v2/embed and /v1/embed."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from sensorium.api.protocol.common import Name, Text
from sensorium.api.protocol.content import Url
from sensorium.api.protocol.items import InputItem
from sensorium.api.protocol.pooling import MAX_INPUTS, PooledInput, SequencesBody, pooled_item
from sensorium.config import Limits, ServerConfig
from sensorium.errors import RequestError
from sensorium.prompt.encode import Side
from sensorium.types import INT32_MAX, Modality, PoolingParams

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
_FIELDS = ("texts", "images", "inputs")


class CohereEmbedRequest(SequencesBody):
    """Texts, images, or inputs of both. Longer ones are cut at their end unless `truncate` says otherwise."""

    is_clipped: ClassVar[bool] = True
    cut_by: ClassVar[str] = "`truncate`: END"

    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)] | None = None
    images: Annotated[list[Url], Field(min_length=1, max_length=MAX_INPUTS)] | None = None
    inputs_: Annotated[list[InputItem], Field(min_length=1, max_length=MAX_INPUTS)] | None = Field(None, alias="inputs")
    input_type: Name | None = None
    output_dimension: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    embedding_types: Annotated[list[EmbeddingType], Field(max_length=6)] | None = None
    truncate: Literal["NONE", "START", "END"] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None

    def check(self, limits: Limits, server: ServerConfig) -> None:
        super().check(limits, server)
        given = [name for name in _FIELDS if self._given(name) is not None]
        if len(given) != 1:
            raise RequestError(
                "Exactly one of `texts`, `images` and `inputs` is needed.",
                param=given[0] if given else "texts",
                code=None if given else "missing_required_parameter",
            )
        for index, item in enumerate(self._items):
            if item == "" or (isinstance(item, InputItem) and item.plain == ""):
                raise RequestError(f"`{self.place(index)}` must not be empty.", param=self.place(index))
        if self.truncate == "NONE" and self.max_tokens is not None:
            raise RequestError("`max_tokens` cuts texts, which `truncate` NONE forbids.", param="max_tokens")

    def _given(self, name: str) -> Any:
        return self.inputs_ if name == "inputs" else getattr(self, name)

    @property
    def _items(self) -> list[str | InputItem]:
        if self.images is not None:
            return [InputItem(image=image) for image in self.images]
        items: list[str | InputItem] = self.texts or self.inputs_ or []  # type: ignore[assignment]
        return items

    @property
    def field(self) -> str:
        return next((name for name in _FIELDS if self._given(name) is not None), "texts")

    @property
    def count(self) -> int:
        return len(self._given(self.field) or ())

    def inputs(self, modalities: frozenset[Modality], limits: Limits) -> list[PooledInput]:
        return [pooled_item(item, self.place(index), modalities, limits) for index, item in enumerate(self._items)]

    def place(self, index: int) -> str:
        return f"{self.field}[{index}]"

    @property
    def has_texts(self) -> bool:
        return any(isinstance(item, str) or item.plain is not None for item in self._items)

    @property
    def type_of_texts(self) -> str | None:
        """Images have a type of their own, which chooses nothing."""
        return None if self.input_type in (None, "image") else self.input_type

    @property
    def chooses(self) -> str | None:
        return "input_type" if self.type_of_texts is not None and self.has_texts else None

    @property
    def most_tokens(self) -> int | None:
        return None if self.truncate == "NONE" else self.max_tokens or -1

    @property
    def cut_side(self) -> Side | None:
        return "left" if self.truncate == "START" else "right"

    def params(self) -> PoolingParams:
        return PoolingParams("embed", normalize=self.use_activation, dimensions=self.output_dimension)
