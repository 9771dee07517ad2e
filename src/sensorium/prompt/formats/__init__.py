"""How models write tool calls and reasoning: found out from the checkpoint, read as they write, held to by grammar."""
