"""How far a part's rankings are from those of exact gradients."""
