"""Many trials of one recipe."""
