"""What tests share: tiny checkpoints, servers, media, harnesses."""
