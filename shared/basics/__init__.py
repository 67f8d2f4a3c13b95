"""What everything stands on: errors, configuration schemas, files, units. Imports nothing of ours."""
