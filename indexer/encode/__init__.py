"""From samples to vectors: tokens, losses, side branches, and checks of these against autograd."""
