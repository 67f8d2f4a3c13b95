"""The JSON schema of eval.json, generated from the dataclasses: ``python -m stage_eval.results.schema`` rewrites it."""

import json
from pathlib import Path

from stage_eval.results.evaluation import FORMAT, Evaluation
from stage_eval.results.record import schema

FILE = Path(__file__).with_name("eval.schema.json")


def text() -> str:
    """The schema as the file holds it."""
    return json.dumps(schema(Evaluation, FORMAT), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
