"""What a user sees of a run: progress bar, loggers, curves."""
