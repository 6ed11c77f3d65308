"""Few-shot classification on features; importing this package registers the classifiers."""
from . import inductive, transductive  # noqa: F401
