"""The native CPU kernels: the library, its weight layouts, oneDNN."""
