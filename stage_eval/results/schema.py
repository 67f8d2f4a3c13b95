"""The JSON schema of eval.json, generated from the dataclasses: ``python -m stage_eval.results.schema`` rewrites it."""

import json
from pathlib import Path

from shared.basics.files import write_text
from stage_eval.results.evaluation import FORMAT, Evaluation
from stage_eval.results.record import schema

FILE = Path(__file__).with_name("eval.schema.json")


def text() -> str:
    """The schema as the file holds it."""
    return json.dumps(schema(Evaluation, FORMAT), indent=2) + "\n"


if __name__ == "__main__":
    write_text(FILE, text())
