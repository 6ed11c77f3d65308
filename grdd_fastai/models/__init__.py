"""Backbones: timm models by name, our own architectures among them, and trained weights."""
