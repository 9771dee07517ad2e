"""The operating system: processes, memory, cores. Knows nothing of models or HTTP."""
