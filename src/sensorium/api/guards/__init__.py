"""Who may come in, how many at a time, and what is counted of them."""
