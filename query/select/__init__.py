"""From scores to a training set."""
