"""What ``ghoststore demo`` runs on: a generated corpus, a tokenizer and a small GPT-2 trained on it.

Nothing here reads a file or the network, and everything follows from a seed. Import from the modules;
``corpus`` needs the standard library alone, ``tokenizer`` and ``training`` load transformers and torch.
"""
