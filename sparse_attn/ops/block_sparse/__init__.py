"""Softmax attention over the active blocks of a `BlockMask`; `reference.py` defines it."""
