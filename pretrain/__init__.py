"""What the three stages share: tokenizer, documents, shards, loader, optimizer, checkpoints, run
log."""
