"""Backbones in timm, by name or with trained weights; importing this package registers ours."""
from . import convnet4, resnet12  # noqa: F401
