"""A small vision-language model that has learnt to name shapes: an SAE finds them, a random one does not.

The commands of docs/shapes.md as they stand there: three minutes of one core.
"""

import json
import re
import shlex
from typing import Any

import numpy as np
import pytest

from tests.cli import REPOSITORY, ForkServer
from tests.documented import blocks

pytest.importorskip("PIL")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What the commands print and find."""
    folder = tmp_path_factory.mktemp("shapes")
    here, printed = stages.at(folder), ""
    (block,) = (one for one in blocks() if one.page == "docs/shapes.md")
    for command in block.commands:
        start, module, *arguments = shlex.split(command)
        words = (str(REPOSITORY / module), *arguments) if start == "python" else (f"stage_{module}", *arguments)
        done = here.start(*words).finish(900)
        assert done.code == 0, done.stderr
        printed += done.stdout
    return printed, json.loads((folder / "shapes/found.json").read_text())


def ious(found: dict[str, dict[str, float]]) -> list[float]:
    return [one["iou"] for one in found.values()]


def test_the_model_has_learnt_its_captions(told: tuple[str, dict[str, Any]]) -> None:
    (right,) = re.findall(r"([\d.]+)% of \d+ held-out captions are right", told[0])
    assert float(right) > 80


def test_latents_are_the_shapes_of_pictures_that_nothing_was_trained_on(told: tuple[str, dict[str, Any]]) -> None:
    learnt, random = ious(told[1]["learnt"]), [ious(one) for one in told[1]["random"]]
    assert len(learnt) == 64
    assert sum(one >= 0.5 for one in learnt) >= 8
    assert len(random) == 3
    for one in random:
        assert float(np.mean(one)) <= 0.25
        assert float(np.mean(learnt)) >= 1.4 * float(np.mean(one))


def test_a_latent_set_in_a_box_changes_what_is_said_of_it(told: tuple[str, dict[str, Any]]) -> None:
    steered, strangers = told[1]["steered"], told[1]["strangers"]
    assert steered["pictures"] >= 10
    assert steered["took"] >= 0.6
    assert strangers["took"] <= 0.1
    assert steered["kept"] >= 0.8
