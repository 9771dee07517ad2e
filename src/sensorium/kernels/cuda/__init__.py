"""Kernels for NVIDIA GPUs, in Triton. Importing this needs Triton; what it does not do is left to the reference."""

from __future__ import annotations

from sensorium.kernels.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
