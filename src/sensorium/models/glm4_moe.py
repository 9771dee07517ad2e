"""GLM-4.5: experts that corrected sigmoids choose, beside one that all tokens take; half of each head is rotated."""

from __future__ import annotations

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.values import count
from sensorium.models.decoder import DecoderForCausalLM


class Glm4Moe(DecoderForCausalLM):
    """Layers behind the last one, which predict several tokens, are passed over."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        first, more = self.text.num_layers, count(checkpoint.config, "num_nextn_predict_layers", 1)
        self.ignored = (*self.ignored, *(f"model.layers.{index}." for index in range(first, first + more)))
