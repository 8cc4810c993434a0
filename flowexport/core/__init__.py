"""Core types: the standard library and numpy, and nothing else of flowexport's."""
