"""What outlives a process: checkpoints, the identity of a run, its lock, the exported dictionary."""
