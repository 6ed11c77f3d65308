"""Backbones in timm, by name or with trained weights."""
