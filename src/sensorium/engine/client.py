"""The HTTP process's half of the engine: starts the child, sends requests, hands out their outputs, watches over it.

Torch-free. (Contract; the implementation follows.)
"""
