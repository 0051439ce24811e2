"""Checkpoints: found, loaded, and told apart."""
