"""Bytes from outside become bounded numpy arrays. The only place that fetches, opens or decodes for a client.

Nothing is imported here: a decode worker must start without the fetcher.
"""
