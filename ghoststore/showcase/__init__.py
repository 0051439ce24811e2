"""What ``ghoststore demo`` runs on: a generated corpus, a tokenizer, and the words that it is compared with.

Nothing here reads a file or the network, and everything follows from a seed. Import from the modules;
``corpus`` needs the standard library alone, ``tokenizer`` loads transformers.
"""
