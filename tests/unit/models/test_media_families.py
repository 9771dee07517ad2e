"""Every family that takes media, through the engine: eight unequal requests, cold and warm, after preemption, over an
int8 cache, and behind quantised towers. What they answer is compared with transformers elsewhere."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from support import families
from support.engine_harness import bench, request, tokens_of
from support.families import maker_of
from support.media_models import Served, again, load, two_of
from support.model_driver import Driver, Sequence

from sensorium.checkpoint.families import FAMILIES
from sensorium.kernels import Quantization
from sensorium.models.loading import load_model
from sensorium.types import Prompt

MAKERS = {
    made: partial(maker_of(made), **({"tie_word_embeddings": False} if made in ("qwen2_vl", "gemma3") else {}))
    for name, made in families.MAKERS.items()
    if FAMILIES[name].modalities and name != "UltravoxModel"  # whose decoder is another folder: test_ultravox.py
}
MAKERS["ministral3"] = partial(maker_of("pixtral.mistral3"), ministral3=True)
each_family = pytest.mark.parametrize("family", list(MAKERS))


@cache
def folder_of(family: str) -> TemporaryDirectory[str]:
    """An engine looks at the files again: the folder stays as long as it is kept here."""
    return TemporaryDirectory()


@cache
def served(family: str) -> Served:
    folder = Path(folder_of(family).name)
    return load(folder, MAKERS[family](folder))


@cache
def prompts_of(family: str) -> list[Prompt]:
    """Eight: without media, with some, with the same behind another text, with all that the family takes."""
    here = served(family)
    every = [item for kind in sorted(here.processor.modalities) for item in two_of(kind)]
    chosen = [every[:1], every[1:2], [], every[:1], every, every[:2], [], every[1:2]]
    return [here.prompt(items, text="{}" + " word" * (3 * i) + "?") for i, items in enumerate(chosen)]


@cache
def runs_of(family: str) -> list[Sequence]:
    return [served(family).run(prompt) for prompt in prompts_of(family)]


@pytest.mark.parametrize("cache", ["auto", "int8"])
@each_family
def test_same_tokens_cold_warm_and_preempted(family: str, cache: str) -> None:
    """Small steps cut media; whoever is preempted, or finds its prompt in the cache, gets the same tokens."""
    model = served(family).model
    driver = Driver(model, num_blocks=1024, block_size=16, int8_cache=cache == "int8")
    wanted = [driver.greedy([again(run)], 4)[0] for run in runs_of(family)]
    requests = [replace(request([], 4), prompt=prompt) for prompt in prompts_of(family)]
    engine = bench(model, max_num_batched_tokens=48, block_size=4, kv_cache_dtype=cache)
    scheduler = engine.engine.scheduler

    def disturb(step: int) -> None:
        if step % 5 == 4 and scheduler.num_running > 1:
            scheduler._preempt((scheduler.decoding or scheduler.prefilling)[0])

    for _ in range(2):
        results = engine.run(*requests, before_step=disturb)
        assert tokens_of(results) == wanted
    assert scheduler.preemptions > 0
    assert any(result.cached for result in results)


@each_family
def test_quantised_towers_see_much_the_same(family: str) -> None:
    here = served(family)
    less = load_model(
        here.model.checkpoint, dtype=torch.float32, device="cpu", quantization=Quantization(8, 32), quantize_towers=True
    )
    rounded = replace(here, model=less)
    for kind in sorted(here.processor.modalities):
        media = [here.processor.process(item) for item in two_of(kind)]
        for ours, expected in zip(rounded.encode(media), here.encode(media), strict=True):
            assert 0 < (ours - expected).norm() < 0.05 * expected.norm(), kind
