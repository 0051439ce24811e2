"""The approximate index: FAISS finds candidates, and the stored vectors give their exact scores."""
