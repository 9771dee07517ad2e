"""HTTP itself: the listener, connections, bodies, event streams, errors. No model, no endpoint."""
