"""docs/config.md is what the schemas and conf/ say, and every key has a meaning."""

import re
from pathlib import Path

import pytest

from shared.basics.config_page import page
from shared.basics.field_docs import docs
from stage_train.config import OnDamage, OptimSchema
from stage_train.sae_schema import SAESchema

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def text() -> str:
    return page(["stage_harvest", "stage_train", "stage_eval", "stage_inspect", "stage_trace"])


def test_the_page_is_current(text: str) -> None:
    assert text == (REPOSITORY / "docs" / "config.md").read_text(), "make docs-config"


def test_every_key_has_a_meaning(text: str) -> None:
    lines = [line for line in text.splitlines() if re.match(r"\| `|  - `", line)]
    assert len(lines) > 130
    assert [line for line in lines if re.search(r"(\|  \||: )$", line)] == []


def test_lines_of_every_kind(text: str) -> None:
    lines = text.splitlines()
    meaning = "Length of the run in tokens; it ends with the first batch that reaches it."
    assert f"| `schedule.tokens` | `count \\| null` | `2000000` | same | {meaning} |" in lines
    assert "| `logger.progress` | `bool` | `true` | free | Show a progress bar. |" in lines
    assert "- `schedule=cosine`: As `wsd`, with `decay=1.0`, `shape=cosine`." in lines
    assert "  - `corpus.files` (`str`, must be given): Path, glob or fsspec URL." in lines
    assert not any("debug=tiny_eval`" in line for line in lines[: lines.index("## python -m stage_eval")])


def test_a_docstring_is_read_from_where_the_field_has_one() -> None:
    assert docs(OptimSchema)["clip_norm"] == "Largest global gradient norm; null does not clip."
    assert docs(OnDamage)["stop"] == "End the run with one line that names the shard."
    assert docs(SAESchema)["expansion"].startswith("Latents per dimension")
    assert docs(SAESchema)["penalty_weight"] == "Its weight; the reconstruction loss counts 1."
