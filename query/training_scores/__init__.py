"""The training-time scores of a run: rankings, tables, plots, and a live view."""
