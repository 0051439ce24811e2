"""The explorer: a local page that asks a store, and the same as JSON for programs."""
