"""What a training run will need, before it is started: memory per rank, bytes to read, time.

    data, job   what is read, and the run as a rank sees it
    memory      what a rank holds: training's own code, followed on tensors without memory
    pace        tokens per second, time, bytes to read
    report      the table and the JSON

docs/planning.md compares the predictions with measured peaks.
"""
