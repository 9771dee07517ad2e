"""Bytes from outside become bounded numpy arrays. The only place that fetches, opens or decodes for a client."""
