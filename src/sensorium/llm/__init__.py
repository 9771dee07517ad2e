"""The engine of `sensorium serve` from Python, without HTTP: `LLM`, `AsyncLLM` and what they take and give."""
