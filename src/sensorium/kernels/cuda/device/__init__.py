"""What runs on the GPU: functions of Triton, which have no types of Python's."""
