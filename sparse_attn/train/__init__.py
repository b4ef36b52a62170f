"""Training: plain functions and dataclasses; only `main` knows configs, only `checkpoint` Orbax."""
