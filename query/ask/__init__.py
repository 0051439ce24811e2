"""From a question (a val set and parts of a store) to the scores that answer it."""
