"""Preparation of large sets of pictures on Apache Beam: `python -m big_vit.prepare filter`."""
