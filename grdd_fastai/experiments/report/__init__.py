"""RESULTS.md, and the measured parts of README.md and of the docs, as they follow from the records in results/."""
