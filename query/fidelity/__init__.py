"""How far the rankings of a part are from those of exact gradients."""
