"""``ghoststore demo``: training, building and querying on a small corpus whose answers are known."""
