"""Training a GPT-2 with every sample scored: ``ghoststore train``."""
