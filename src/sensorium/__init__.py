"""Sensorium: multimodal models behind OpenAI's API, and from Python. Importing this package loads neither torch nor
transformers; `LLM` and what belongs to it are loaded when they are first named."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sensorium.llm.async_llm import AsyncLLM
    from sensorium.llm.llm import LLM
    from sensorium.llm.params import LoRARequest, PoolingParams, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "LoRARequest", "PoolingParams", "SamplingParams", "__version__"]

_PARAMS = ("SamplingParams", "PoolingParams", "LoRARequest")
_HOMES = {"LLM": "llm.llm", "AsyncLLM": "llm.async_llm", **dict.fromkeys(_PARAMS, "llm.params")}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
