"""Bodies of text-embeddings-inference's routes: `inputs` instead of `input`, answers without anything around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from sensorium.api.protocol.common import Name, Nested, Text
from sensorium.api.protocol.other_servers import UNPROMPTED, VECTORS, Foreign
from sensorium.api.protocol.pooling import MAX_INPUTS, InputBody, InputField, PoolingBody
from sensorium.api.protocol.score import ComparingBody, check_items
from sensorium.config import Limits, ServerConfig
from sensorium.errors import RequestError
from sensorium.prompt.encode import Side
from sensorium.types import INT32_MAX, PoolingParams

Direction = Literal["Left", "Right", "left", "right"]
_SIDES: Mapping[str, Side] = {"left": "left", "right": "right"}


class TruncatedBody(PoolingBody):
    """`truncate` cuts to what the model takes."""

    cut_by: ClassVar[str] = "`truncate`: true"

    truncate: bool | None = None
    truncation_direction: Direction | None = None

    @property
    def most_tokens(self) -> int | None:
        return -1 if self.truncate else super().most_tokens

    @property
    def cut_side(self) -> Side | None:
        return super().cut_side if self.truncation_direction is None else _SIDES[self.truncation_direction.lower()]


class EmbedRequest(TruncatedBody, InputBody):
    foreign: ClassVar[Mapping[str, Foreign]] = VECTORS
    input_name: ClassVar[str] = "inputs"

    input: InputField | None = Field(None, alias="inputs")
    prompt_name: Name | None = None
    normalize: bool | None = None
    dimensions: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None

    @property
    def name_of_prompt(self) -> str | None:
        return self.prompt_name

    @property
    def chooses(self) -> str | None:
        return None if self.prompt_name is None else "prompt_name"

    def params(self) -> PoolingParams:
        return PoolingParams("embed", normalize=self.normalize, dimensions=self.dimensions)


def _prediction_form(value: Any) -> str:
    if not isinstance(value, list):
        return "<text>"
    return "<many>" if value and isinstance(value[0], list) else "<pair>"


Texts = Annotated[list[Text], Field(min_length=1, max_length=2)]


class PredictRequest(TruncatedBody):
    """`inputs`: a text, a pair of texts, or a list of such, each of them a list of one or two."""

    foreign: ClassVar[Mapping[str, Foreign]] = UNPROMPTED

    inputs: Annotated[
        Annotated[Text, Tag("<text>")]
        | Annotated[Texts, Tag("<pair>")]
        | Annotated[list[Texts], Field(min_length=1, max_length=MAX_INPUTS), Tag("<many>")],
        Discriminator(_prediction_form),
    ]
    raw_scores: bool | None = None

    def check(self, limits: Limits, server: ServerConfig) -> None:
        super().check(limits, server)
        kinds = {len(texts) for texts in self.sequences}
        if len(kinds) > 1:
            raise RequestError("`inputs` must be all texts or all pairs.", param="inputs")
        if any(not text for texts in self.sequences for text in texts):
            raise RequestError("`inputs` must not have empty texts.", param="inputs")

    @property
    def is_batch(self) -> bool:
        return isinstance(self.inputs, list) and isinstance(self.inputs[0], list)

    @property
    def sequences(self) -> list[list[str]]:
        """Each input's text, or two."""
        given: Any = self.inputs
        if isinstance(given, str):
            return [[given]]
        many: list[list[str]] = given if self.is_batch else [given]
        return many

    def params(self) -> PoolingParams:
        return PoolingParams("classify", activation=False if self.raw_scores else self.use_activation)


class Comparison(Nested):
    source_sentence: Text
    sentences: Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]


class SimilarityRequest(ComparingBody):
    inputs: Comparison

    def check(self, limits: Limits, server: ServerConfig) -> None:
        super().check(limits, server)
        check_items([self.inputs.source_sentence], "inputs.source_sentence", single=True)
        check_items(self.inputs.sentences, "inputs.sentences")
