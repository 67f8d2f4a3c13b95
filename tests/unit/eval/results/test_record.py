"""Results as JSON and back, the schema of eval.json, and documents that are not what they should be."""

import copy
import json
import math
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import pytest

from shared.basics.errors import GranaryError
from stage_eval.results import record, schema
from stage_eval.results.comparison import Comparison, compare
from stage_eval.results.evaluation import Evaluation
from stage_eval.results.record import OPTIONAL, Record
from tests.evaluations import document, example


@dataclass(frozen=True, kw_only=True)
class Small(Record):
    """A record with every kind of field."""

    share: float | None
    counts: list[int]
    interval: tuple[float, float] | None
    named: dict[str, float | None]
    rest: dict[str, Any]
    extra: str | None = field(default=None, metadata=OPTIONAL)


def test_undefined_figures_are_none_in_memory_as_in_the_file() -> None:
    small = Small(share=math.nan, counts=[1], interval=None, named={"a": math.inf, "b": 2.0}, rest={"deep": [math.nan]})
    assert (small.share, small.named, small.rest) == (None, {"a": None, "b": 2.0}, {"deep": [None]})
    assert Small.from_json(json.loads(json.dumps(small.to_json(), allow_nan=False))) == small


def test_keys_come_in_the_order_of_the_fields_and_absent_ones_are_left_out() -> None:
    small = Small(share=0.5, counts=[], interval=(1.0, 2.0), named={}, rest={})
    assert list(small.to_json()) == ["share", "counts", "interval", "named", "rest"]
    assert small.to_json()["interval"] == [1.0, 2.0]
    assert Small.from_json({**small.to_json(), "extra": "x"}).extra == "x"


GOOD = {"share": 0.5, "counts": [1], "interval": [0.0, 1.0], "named": {}, "rest": {}}
WRONG = (
    ({"share": "0.5"}, "share is '0.5', which is not of the type float"),
    ({"counts": [1, True]}, r"counts\[1\] is True"),
    ({"counts": 3}, "counts is 3"),
    ({"interval": [1.0]}, r"interval is \[1.0\]"),
    ({"named": {"a": []}}, r"named.a is \[\]"),
    ({"surprise": 1}, "unknown keys surprise"),
)


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_document_is_told_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(GranaryError, match=message):
        Small.from_json({**GOOD, **change})


def test_a_missing_key_is_told() -> None:
    with pytest.raises(GranaryError, match="the document lacks the key share"):
        Small.from_json({key: value for key, value in GOOD.items() if key != "share"})
    with pytest.raises(GranaryError, match="is not a JSON object"):
        Small.from_json([])


def test_the_schema_file_is_current() -> None:
    assert schema.FILE.read_text() == schema.text(), "run python -m stage_eval.results.schema"


def test_an_evaluation_is_what_the_schema_says() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema.text()))
    validator.check_schema(validator.schema)
    validator.validate(example().to_json())
    for path in (["fvu"], ["latents", "dead"], ["downstream", "confidence95"], ["provenance", "store", "digest"]):
        broken = copy.deepcopy(document())
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = "wrong" if path[-1] != "digest" else 1
        assert list(validator.iter_errors(broken))
        with pytest.raises(GranaryError, match=path[-1]):
            Evaluation.from_json(broken)


def test_evaluations_and_comparisons_come_back_as_they_went() -> None:
    report = document()
    assert Evaluation.from_json(report).to_json() == report
    comparison = compare([example(), example(k=8)], ["a", None])
    assert Comparison.from_json(json.loads(json.dumps(comparison.to_json()))) == comparison


def test_two_records_of_one_name_are_no_schema() -> None:
    """One would stand for both in the file's ``$defs``."""
    as_record = dataclass(frozen=True, kw_only=True)
    other = as_record(type("Small", (Record,), {"__doc__": "Another.", "__annotations__": {}}))
    holder = as_record(type("Holder", (Record,), {"__annotations__": {"first": Small, "second": other}}))
    with pytest.raises(TypeError, match="two records are called Small"):
        record.schema(holder, "both")
