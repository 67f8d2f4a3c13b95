"""What a training run will need, before it is started: memory per rank, bytes to read, time.

    run       the run that is planned, checked as training checks it, and the share of one rank
    memory    what a rank holds: training's own code, followed on tensors without memory
    pace      speed and reading

docs/planning.md compares the predictions with measured peaks.
"""
