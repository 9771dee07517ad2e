"""Sensorium: multimodal models behind OpenAI's API. Importing this package loads neither torch nor transformers."""

__version__ = "0.1.0"
