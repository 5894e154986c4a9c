"""Tools to inspect checkpoints, runs and data."""
