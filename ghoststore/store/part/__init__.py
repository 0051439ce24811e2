"""Parts: one build each."""
