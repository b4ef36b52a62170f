"""Softmax attention of every query to its own list of blocks; `reference.py` defines it."""
