"""Looking into checkpoints, runs and data."""
