"""The environment of every step: executor contract, progress, ranks."""
