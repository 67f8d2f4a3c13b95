"""The Python block of docs/vision.md that steers, run on the model and the pictures of its first command."""

import random
import re
from pathlib import Path

import pytest

from examples.pictures import drawn, write_model
from tests.isolation import REPOSITORY
from tests.modules import sae_of

PAGE = "docs/vision.md"


def test_its_steering_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    monkeypatch.chdir(tmp_path)
    write_model(Path("pictures/model"))
    Path("picture.png").write_bytes(drawn("red", "circle", random.Random(0)))
    sae_of(32).save_pretrained("runs/pictures/sae")
    text = (REPOSITORY / PAGE).read_text(encoding="utf-8")
    (block,) = (found for found in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "SplicedModel" in found)
    names: dict[str, object] = {}
    exec(compile(block, PAGE, "exec"), names)
    inputs, reader = names["inputs"], names["reader"]
    is_image = (inputs["input_ids"] == reader.image_id)[0]
    cells = is_image.nonzero()[:, 0].tolist()
    applied = names["spliced"].features.applied[0].nonzero()[:, 0].tolist()
    # The middle 48 x 48 pixels of 64 x 48 are seen in 4 x 4 cells of 12: two by two of them are in the box.
    assert [cells.index(place) for place in applied] == [1, 2, 5, 6]
