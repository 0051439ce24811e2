"""Exact gradients, not projected."""
