"""One file per model family: decoded media to tower inputs, placeholder counts, positions. No torch."""
