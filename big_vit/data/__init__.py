"""Data: sources, their order, transforms, and the way to the devices."""
