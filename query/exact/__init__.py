"""Exact gradients, which are not projected."""
