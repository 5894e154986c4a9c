"""Multi-process runs: finding the other processes, comparing them, and noticing losses."""
