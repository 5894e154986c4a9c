"""Pretrained parameters: load them, adapt them to another model, or continue a run."""
