"""The scores of a training run: sums, tables, plots, and a live view."""
