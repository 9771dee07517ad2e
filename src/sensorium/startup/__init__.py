"""From options to a model that answers: what `sensorium serve` and `LLM` have in common."""
