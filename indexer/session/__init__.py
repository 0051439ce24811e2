"""One training run, scored and recorded: what the training command, the manager and the callback share."""
