"""Pooled vectors, classes and scores from hidden states."""
