"""Runs: what one training wrote of itself."""
