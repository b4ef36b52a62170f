"""Rules that choose blocks from q and k at run time, one file each; found by their module path."""
