"""Evaluators: factories of functions that score parameters, one file each; see registry.py."""
