"""The options of all commands, with their types, defaults and help. Nothing here imports torch."""
