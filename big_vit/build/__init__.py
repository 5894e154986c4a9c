"""From the sections of a config to the objects that they describe."""
