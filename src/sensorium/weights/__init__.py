"""Files -> tensors: safetensors and pickles read piece by piece, stored codes, the disk cache of quantised copies."""
