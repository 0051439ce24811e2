"""The approximate index: FAISS finds candidates, the stored vectors give their exact scores."""
