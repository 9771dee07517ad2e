"""HTTP and JSON: requests in, responses out. No tensors, no torch."""
