"""``ghoststore.export``: what a store knows of its rows, for other tools."""
