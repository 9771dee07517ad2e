"""Messages become token ids; token ids become text."""
