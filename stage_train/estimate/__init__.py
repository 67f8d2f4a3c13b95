"""What a training run will need, before it is started: memory per rank, bytes to read, time.

    memory      every quantity as a small pure function, with its formula
    phases      what is alive together, and so the peak
    job         the numbers of one run, from its configuration and, where there is one, its store
    pace        tokens per second, time, bytes to read
    report      the table and the JSON

docs/training.md compares the predictions with measured peaks.
"""
