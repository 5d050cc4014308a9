"""Research about the project: the study that docs/RESULTS.md reports. Not installed."""
