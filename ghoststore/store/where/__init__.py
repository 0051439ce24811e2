"""Choosing rows by a condition in SQL over their columns, ``where``."""
