"""The folder of a run: checkpoints, provenance and results."""
