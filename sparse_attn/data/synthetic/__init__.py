"""Synthetic tasks that separate attention variants: recall, copying, retrieval, state tracking.

One file per family. A task is a frozen dataclass that draws one example from a NumPy generator;
`base.dataset` turns it into a Grain dataset whose examples are a function of (seed, split, index).
"""
