"""Puts this folder on the import path, so that tests share checkpoints.py and models/driver.py."""
