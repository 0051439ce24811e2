"""Choosing a training set by scores, and writing it."""
