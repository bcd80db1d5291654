"""What the three stages share: tokenizer, documents, shards, loader, optimizer, checkpoints, run
log."""

__version__ = "0.2.0"
