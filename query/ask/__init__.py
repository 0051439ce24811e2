"""A question: its val set, its parts, and the scores that answer it."""
