"""Token shards: a corpus as tokens."""
