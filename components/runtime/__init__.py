"""What every step runs in: executor contract, progress, ranks."""
