"""From samples to vectors: tokens, losses, side branches, and what holds them against autograd."""
