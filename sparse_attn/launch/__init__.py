"""Sweeps: which runs there are (`sweep`, `units`), how they are started and followed (`engine`)."""
