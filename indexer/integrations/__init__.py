"""Training-time scores in loops of the user's own, and in transformers' Trainer."""
