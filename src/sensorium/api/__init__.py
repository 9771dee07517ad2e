"""HTTP and JSON: the edge of the server. No tensors, no media bytes beyond the body, no tokenizer rules."""
