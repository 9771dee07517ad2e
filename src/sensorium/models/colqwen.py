"""ColQwen2 and ColQwen2.5: Qwen's vision models with a small vector of every token in place of a language head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sensorium.checkpoint.text_config import TextConfig
from sensorium.models.layers import Head, Linear
from sensorium.models.qwen2_5_vl import Qwen25VL
from sensorium.models.qwen2_vl import Qwen2VL
from sensorium.pooling.embedding import stored_rows
from sensorium.pooling.pooler import Pooler, VectorsPooler
from sensorium.types import PoolingTask

PREFIXES = {
    "embedding_proj_layer.": "custom_text_proj.",
    "vlm.model.language_model.": "model.",
    "vlm.language_model.": "model.",
    "vlm.model.visual.": "visual.",
    "vlm.visual.": "visual.",
    "vlm.model.": "model.",
    "language_model.": "model.",
    **Qwen2VL.weight_prefixes,
}


class ColQwen2(Qwen2VL):
    generates = False
    weight_prefixes: ClassVar[Mapping[str, str]] = PREFIXES
    ignored: tuple[str, ...] = (*Qwen2VL.ignored, "lm_head.", "vlm.lm_head.")

    def _declare_head(self, config: TextConfig) -> Linear | None:
        return None

    def _make_poolers(self) -> Mapping[PoolingTask, Pooler]:
        size = stored_rows(self.checkpoint.weight_files, "custom_text_proj.weight", "embedding_proj_layer.weight")
        self.custom_text_proj = Head(self.text.hidden_size, size, bias=True)
        return {"token_embed": VectorsPooler(size, normalize=True, head=self.custom_text_proj)}


class ColQwen25(Qwen25VL):
    generates = False
    weight_prefixes: ClassVar[Mapping[str, str]] = PREFIXES
    ignored: tuple[str, ...] = ColQwen2.ignored
    _declare_head = ColQwen2._declare_head
    _make_poolers = ColQwen2._make_poolers
