"""Puts this folder on the import path, so that tests share checkpoints.py and models/driver.py."""

from sensorium.engine.core import set_torch_environment

set_torch_environment()  # as in the engine process; before anything imports torch
