"""Pictures, tables and estimates of patterns and runs, for terminals, notebooks and reports.

>>> from sparse_attn import viz
>>> viz.cost("local(window=512)", 8192, head_dim=64, heads=4).block_density
0.07568359375
"""

import importlib

# Loaded when asked for: printing a pattern must not load what reads checkpoints.
_HOMES = {
    "compare": "comparison",
    "cost": "costs",
    "interior_visits": "simulate",
    "load_for_inspection": "inspect_run",
    "on_grid": "grid",
    "receptive_field": "reach",
    "show_on_grid": "grid",
    "show_order": "grid",
    "simulate_tiles": "simulate",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"sparse_attn.viz.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sparse_attn.viz' has no attribute {name!r}")
