"""Transforms of examples on the host, written as a line of text."""

from big_vit.data.transforms.transform import *  # noqa: F403
