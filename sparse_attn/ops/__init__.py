"""How block masks are executed: one folder per op, one file per backend."""
