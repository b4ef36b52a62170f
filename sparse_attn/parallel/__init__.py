"""Many devices: the mesh and its rules, attention over its axes, token orders that balance work."""
