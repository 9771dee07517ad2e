"""The plain torch reference of every kernel."""
