"""Optimizers of other packages, number for number, for runs that began there."""
