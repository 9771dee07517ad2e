"""Replicas of a server on machines that Ray has: placed, scaled and replaced there, served by the same code."""
