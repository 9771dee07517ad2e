"""Disposable child processes for work on what strangers send: how they start, what they may, and the frames between."""
