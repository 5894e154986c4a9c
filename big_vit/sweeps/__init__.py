"""Sweeps over settings and seeds, and the folders they are kept in."""
