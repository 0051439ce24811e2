"""Checkpoints: finding, loading and identifying models and tokenizers."""
