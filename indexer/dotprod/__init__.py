"""Training-time scores: ⟨∇ℓ_i, ∇L_val⟩ of every sample of a step. Design: ``docs/design/0002-training-scores.md``."""

from indexer.dotprod.engine import GradDotProdEngine
from indexer.dotprod.scores import Scores
from indexer.dotprod.val_data import language_model_losses, target_counts

__all__ = ["GradDotProdEngine", "Scores", "language_model_losses", "target_counts"]
