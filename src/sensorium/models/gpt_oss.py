"""GPT-OSS: attention with sinks and, in turn, a window; experts with biases whose gate and up rows take turns."""

from __future__ import annotations

from typing import ClassVar

from sensorium.models.base import Rename
from sensorium.models.decoder import DECODER_MAP, DecoderForCausalLM

_MLP = "model.layers.{n}.mlp."
_EXPERTS, _EXPERT = f"{_MLP}experts.", f"{_MLP}experts.[*]."


class GptOss(DecoderForCausalLM):
    """Experts of a layer are one tensor with the inputs first, or mxfp4 codes, which `weights` takes apart."""

    weight_map: ClassVar[tuple[Rename, ...]] = (
        Rename(f"{_MLP}router.{{p}}", f"{_MLP}gate.{{p}}"),
        Rename(f"{_EXPERTS}gate_up_proj", f"{_EXPERT}gate_up_proj.weight", "gate|up", inputs_first=True),
        Rename(f"{_EXPERTS}down_proj", f"{_EXPERT}down_proj.weight", inputs_first=True),
        Rename(f"{_EXPERTS}gate_up_proj_bias", f"{_EXPERT}gate_up_proj.bias", "gate|up"),
        Rename(f"{_EXPERTS}down_proj_bias", f"{_EXPERT}down_proj.bias"),
        Rename(f"{_EXPERTS}{{e}}.gate_up_proj.{{p}}", f"{_EXPERTS}{{e}}.gate_up_proj.{{p}}", "gate|up"),
        *DECODER_MAP,
    )
