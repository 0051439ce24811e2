"""Which layers are projected, and with which matrices: drawn, learned, sketched."""
