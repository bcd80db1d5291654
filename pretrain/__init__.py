"""What the three stages share: tokenizer, documents, shards, loader, schedule, optimizer, checkpoints, run log."""
