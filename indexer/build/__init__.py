"""From a checkpoint and a corpus to a part of a store."""
