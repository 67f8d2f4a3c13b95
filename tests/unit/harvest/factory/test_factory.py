"""Rows of any module: laid out as contexts first, then made as a plain forward gives them, from the same batches."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.basics.errors import GranaryError
from shared.intervene.attach import attach
from shared.lm import capture
from shared.lm.calls import Masked
from shared.lm.modulepoint import site_of
from shared.lm.targets import resolve
from shared.sae import SAEConfig
from stage_harvest.factory.made import Made, digest_of, made_by
from stage_harvest.factory.rows import BatchForward
from stage_harvest.factory.survey import Survey
from stage_harvest.tokens.packing import Context
from tests.modules import CASES, MLP, ConvNet, noise, seeded
from tests.splicing import BOS, tiny_llama

PLACE = SAEConfig(k=1, expansion=1)
T = 7


def surveyed(
    model: nn.Module, targets: list[str], batches: Any, limit: int | None = None, seq_len: int = T
) -> tuple[Survey, list[Context]]:
    """A survey of batches (a list, or a function of a seed) and the contexts that they fill."""
    given = batches if callable(batches) else lambda seed: batches
    saes = attach(model, dict.fromkeys(targets, PLACE))
    survey = Survey(Made("mine:make", model, given), saes, seed=3, seq_len=seq_len, limit=limit)
    return survey, list(survey.contexts())


def filled(survey: Survey, shards: list[range]) -> dict[str, Tensor]:
    """All rows by site, made shard by shard in the order given."""
    forward, parts = BatchForward(survey), {}
    for contexts in shards:
        out = {site: torch.full((len(contexts) + 1, survey.seq_len, d), math.nan) for site, d in survey.widths.items()}
        done: list[int] = []
        forward.fill(contexts, out, done.append)
        assert sum(done) == len(contexts)
        assert all(tensor[len(contexts) :].isnan().all() for tensor in out.values())
        parts[contexts.start] = {site: tensor[: len(contexts)] for site, tensor in out.items()}
    return {site: torch.cat([parts[start][site] for start in sorted(parts)]).flatten(0, 1) for site in survey.widths}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_a_plain_forward(name: str) -> None:
    case = CASES[name]
    model = case.make()
    survey, contexts = surveyed(model, [case.target], [case.inputs(), case.inputs()])
    (point,) = resolve(model, case.target)
    assert survey.widths == {site_of(point): case.width}
    with torch.no_grad(), capture(model, [point]) as captured:
        model(**case.inputs())
    plain = captured[point]
    shape = plain.shape[:-1]
    rows = plain.reshape(-1, case.width)
    count, total = len(rows), 2 * len(rows)
    assert [(one.first, one.count) for one in survey.batches] == [(0, count), (count, count)]
    assert survey.num_contexts == len(contexts) == math.ceil(total / T)
    shards = [range(start, min(start + 2, len(contexts))) for start in range(0, len(contexts), 2)]
    found = filled(survey, shards)[site_of(point)]
    assert torch.equal(found[:total], torch.cat([rows, rows]))
    assert not found[total:].any()
    assert torch.equal(filled(survey, shards[::-1])[site_of(point)], found)  # in whatever order shards are made
    length = math.prod(shape[1:])  # of an example
    tokens, segments = (np.concatenate([context[at] for context in contexts])[:total] for at in (0, 2))
    assert tokens.tolist() == [row % length for row in range(total)]
    first_of_context = [row - row % T for row in range(total)]
    assert segments.tolist() == [row // length - first // length for row, first in enumerate(first_of_context)]
    mask = np.concatenate([context.mask_T for context in contexts])
    assert mask.sum() == 2 * case.rows
    assert not mask[total:].any()
    assert all((context.segments_T == -1).sum() == 0 for context in contexts[:-1])


def test_padding_and_special_tokens_do_not_count_and_a_mask_is_taken_as_it_is() -> None:
    ids = torch.tensor([[0, 0, BOS, 5, 6], [BOS, 7, 8, 9, 4]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    survey, contexts = surveyed(tiny_llama(), ["model.layers.1"], [batch], seq_len=10)
    assert contexts[0].mask_T.tolist() == [False] * 3 + [True] * 2 + [False] + [True] * 4
    assert survey.examples == 2
    mask = torch.arange(10).reshape(2, 5) % 3 == 0
    _, contexts = surveyed(tiny_llama(), ["model.layers.1"], [Masked(batch, mask)], seq_len=10)
    assert contexts[0].mask_T.tolist() == mask.reshape(-1).tolist()
    image, where = noise(2, 3, 2, 2), torch.tensor([[[True, False], [False, False]]] * 2)
    _, contexts = surveyed(seeded(ConvNet)(), ["stage.2"], [Masked((image,), where)], seq_len=8)
    assert contexts[0].mask_T.tolist() == [True, False, False, False] * 2
    with pytest.raises(GranaryError, match=r"mask of batch 0 is \[2, 2\], and there are \[2, 2, 2\] activations"):
        surveyed(seeded(ConvNet)(), ["stage.2"], [Masked((image,), where[:, 0])])


def test_several_places_lie_row_by_row() -> None:
    model, batches = seeded(MLP)(), [noise(5, 6), noise(3, 6), noise(5, 6)]
    survey, contexts = surveyed(model, ["fc1", "fc2:in"], batches, seq_len=4)
    found = filled(survey, [range(4)])
    assert torch.equal(found["fc1"][:13], torch.cat([model.fc1(one) for one in batches]))  # type: ignore[operator]
    assert found.keys() == {"fc1", "fc2-in"}
    assert (len(contexts), survey.num_rows, contexts[-1].mask_T.tolist()) == (4, 13, [True, False, False, False])
    with pytest.raises(GranaryError, match=r"stage.2 40, head 2 rows, .* stores of their own"):
        surveyed(seeded(ConvNet)(), ["stage.2", "head"], [noise(2, 3, 4, 5)])


def test_a_limit_ends_the_pass() -> None:
    drawn = []

    def batches(seed: int) -> Iterator[Tensor]:
        for number in range(100):
            drawn.append(seed)
            yield noise(5, 6) + number

    survey, contexts = surveyed(seeded(MLP)(), ["fc1"], batches, limit=3, seq_len=4)
    assert len(contexts) == survey.num_contexts == 3
    assert drawn == [3] * 3
    assert filled(survey, [range(3)])["fc1"].shape == (12, 12)


def test_the_model_runs_once_for_each_kind_of_batch_before_anything_is_written() -> None:
    model, runs = seeded(MLP)(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    survey, _ = surveyed(model, ["fc1"], [noise(5, 6)] * 4 + [noise(3, 6)] * 4)
    assert len(runs) == 2
    filled(survey, [range(2), range(2, 5)])
    assert len(runs) == 2 + 8  # a batch that two shards share is run once where they are made one after the other


class Moody(nn.Module):
    """Gives as many rows as its input has positive ones."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x[x[:, 0] > 0])


def test_rows_that_do_not_follow_from_shapes_are_refused() -> None:
    survey, _ = surveyed(Moody(), ["fc"], [torch.ones(4, 6), -torch.ones(4, 6)])
    with pytest.raises(GranaryError, match="fc gave 0 rows for batch 1, and 4 for one of the same shapes"):
        filled(survey, [range(2)])


def test_batches_that_are_others_the_second_time_are_refused() -> None:
    calls = []

    def batches(seed: int) -> Iterator[Tensor]:
        calls.append(seed)
        yield noise(5, 6)
        yield noise(5, 6) + len(calls)

    survey, _ = surveyed(seeded(MLP)(), ["fc1"], batches)
    with pytest.raises(GranaryError, match=r"batch 1 of model\.factory=mine:make is not what it was"):
        filled(survey, [range(2)])
    ending = iter([[noise(9, 6)] * 2, [noise(9, 6)]])
    survey, _ = surveyed(seeded(MLP)(), ["fc1"], lambda seed: next(ending))
    with pytest.raises(GranaryError, match=r"batch 1 of model\.factory=mine:make is not what it was"):
        filled(survey, [range(3)])


def test_a_digest_is_of_everything_in_a_batch() -> None:
    x = torch.arange(6.0)
    different: list[Any] = [
        x, x.reshape(2, 3), x.double(), x + 1, -0.0 * x, 0.0 * x, (x,), [x, x], {"a": x}, {"b": x}, (x, None),
        (x, True), (x, 1), (x, 1.0), (x, "1"), Masked(x, x > 1), Masked(x, x > 2), {"a": x[:0]}, {"a": {"a": x}},
        x.bfloat16(),
    ]  # fmt: skip
    digests = [digest_of(one) for one in different]
    assert len(set(digests)) == len(different)
    assert [digest_of(one) for one in different] == digests
    assert digest_of(x.numpy()) == digest_of(x)
    assert digest_of(torch.stack([x, x], 1)[:, 0]) == digest_of(x)  # however it lies in memory
    with pytest.raises(GranaryError, match="a batch holds a set, which can't be compared"):
        digest_of({"a": {1}})


SOURCE = """
import torch
def raising():
    return torch.zeros(2) @ torch.zeros(3)
def net():
    return torch.nn.Linear(2, 2)
def empty():
    return torch.nn.Linear(2, 2), lambda seed: []
def failing():
    def batches(seed):
        yield torch.zeros(1, 2)
        raise KeyError("seven")
    return torch.nn.Linear(2, 2), batches
def wide():
    return torch.nn.Sequential(torch.nn.Linear(2, 2)), lambda seed: [torch.zeros(1, 3)]
there = 3
"""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere_at_all:make", "model.factory=nowhere_at_all:make: ModuleNotFoundError: No module named 'nowhere_at"),
        ("my_factories", "write package:function, for example"),
        ("my_factories:a.b", "write package:function"),
        ("my_factories:absent", "my_factories has no function absent"),
        ("my_factories:there", "my_factories has no function there"),
        ("my_factories:raising", r"RuntimeError: .*my_factories\.py, line 4\)"),
        ("my_factories:net", "gave a Linear: it must return a torch module and a function of a seed"),
    ],
)
def test_what_is_no_factory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, told: str) -> None:
    (tmp_path / "my_factories.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_factories", raising=False)
    with pytest.raises(GranaryError, match=told):
        made_by(name, torch.device("cpu"))


def test_what_fails_in_batches_and_forwards_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_factories.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_factories", raising=False)
    failing, wide = (made_by(f"my_factories:{name}", torch.device("cpu")) for name in ("failing", "wide"))
    with pytest.raises(GranaryError, match=r"batches of .*:failing: KeyError: 'seven' \(.*my_factories.py, line 12\)"):
        list(failing.iterate(0))
    saes = attach(wide.model, {"0": PLACE})
    with pytest.raises(GranaryError, match=r"a forward of the model of .*my_factories:wide: RuntimeError: .*mat1 and"):
        list(Survey(wide, saes, seed=0, seq_len=4, limit=None).contexts())


def test_the_identity_is_that_of_the_weights() -> None:
    one, other = (Made("mine:make", seeded(MLP)(), lambda seed: []) for _ in range(2))
    assert one.identity() == other.identity()
    assert one.identity()["factory"] == "mine:make"
    other.model.batch_norm.running_mean += 1  # type: ignore[union-attr, operator]
    assert one.identity()["weights_hash"] != other.identity()["weights_hash"]
