"""Token shards: a corpus that is stored as tokens."""
