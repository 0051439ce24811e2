"""Which layers are projected, and through which matrices: drawn, learned, sketched."""
