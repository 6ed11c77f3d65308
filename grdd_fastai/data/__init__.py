"""From raw data sets to batches and episodes."""
