"""ColQwen2 as transformers saves it: Qwen2-VL's images, whose rows are counted like text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sensorium.processors.qwen2_vl import Qwen2VLProcessor
from sensorium.types import MediaFeatures, MediaSpan


class ColQwen2Processor(Qwen2VLProcessor):
    def positions(
        self, token_ids: NDArray[np.int32], spans: Sequence[MediaSpan], media: Sequence[MediaFeatures]
    ) -> tuple[NDArray[np.int32] | None, int]:
        """0, 1, 2, …, as `ColQwen2ForRetrieval` has it; colpali-engine's class takes Qwen2-VL's."""
        return None, 0
