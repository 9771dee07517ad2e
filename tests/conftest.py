"""Puts this folder on the import path, so that tests share checkpoints.py and models/driver.py."""

import os

from sensorium.engine.core import REPRODUCIBLE

os.environ.setdefault(*REPRODUCIBLE)  # as in the engine process; before anything imports torch
