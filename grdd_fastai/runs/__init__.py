"""A run's folder: checkpoints, provenance, results."""
