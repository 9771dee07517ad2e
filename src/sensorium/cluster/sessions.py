"""Which replica takes a request, where Ray's own Python routes: that of its session, else the less busy of two.

Imported by Ray alone, in its routers' processes; without Ray there is nothing to import here.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter


class SessionRouter(ConsistentHashRouter):  # type: ignore[misc]  # Ray has no types for us
    """Ray's router by `x-session-id` sends what has no session anywhere, however busy that is; this one does not."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Replicas in ranks; of a rank the one with the fewest requests is taken."""
        if pending_request is None or pending_request.metadata.session_id:
            ranks: list[list[Any]] = await super().choose_replicas(candidate_replicas, pending_request)
            return ranks
        pending_request.routing_context.should_backoff = True
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
