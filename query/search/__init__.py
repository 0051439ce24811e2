"""Exact search over the vectors of parts."""
