"""The engine: scheduler, caches, runner, sampler, and the process boundary around them."""
