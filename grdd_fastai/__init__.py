"""Few-shot image classification by Global Relatedness Decoupled-Distillation (arXiv 2107.05583), in fastai and timm."""
__version__ = '0.2.0'

from . import models  # noqa: F401  (registers the backbones in timm)
