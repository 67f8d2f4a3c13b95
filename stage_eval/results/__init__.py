"""The typed results of an evaluation: eval.json and comparison.json as dataclasses, and the schema of eval.json."""
