"""Static visibility rules, one file each. `patterns.Local`, `patterns.find("local")`, `parse`."""

from sparse_attn.patterns.base import Pattern, discover, find, parse

__all__ = ["Pattern", "discover", "find", "parse"]


def __getattr__(name: str):
    # Classes resolve by module path (`patterns.GlobalTokens` -> global_tokens.py), so that a new
    # pattern file needs no line here.
    module = "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")
    if name[:1].isupper() and module in discover():
        return find(module)
    raise AttributeError(f"module 'sparse_attn.patterns' has no attribute {name!r}")
