"""One model on several devices: the ranks and what they say to each other about tensors."""
