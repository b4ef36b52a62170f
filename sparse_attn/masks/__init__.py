"""Blocks: the only code that knows how a visibility rule becomes lists of active blocks."""
