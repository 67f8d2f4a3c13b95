"""One step and the loop around it: trainer, schedules, metrics, layouts over processes."""
