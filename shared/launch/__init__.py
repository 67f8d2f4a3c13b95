"""Starting processes: a stage from its command line, ranks under torchrun, jobs under Slurm."""
