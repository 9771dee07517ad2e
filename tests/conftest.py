"""Sets the environment of torch's libraries as the engine process does, before anything imports torch."""

from sensorium.engine.loop import set_torch_environment

set_torch_environment()  # as in the engine process; before anything imports torch
