"""Rows in memory: none twice, none lost, mixed, and the same for the same seed."""

import pytest
import torch
from torch import nn

from shared.basics.errors import GranaryError
from shared.intervene.attach import attach
from shared.parallel import World
from shared.sae import SAEConfig
from stage_train.online.buffer import RowBuffer
from stage_train.online.rows import ModelRows
from stage_train.online.stream import BatchesEndedError, BufferedStream

CPU = torch.device("cpu")
WORLD = World(0, 1, 0, CPU)
OPEN = SAEConfig(k=1, d_latent=2)


class Both(nn.Module):
    """Gives its input, and each row of it three times."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.idle = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.three(x.repeat_interleave(3, 0))
        out: torch.Tensor = self.one(x)
        return out


def numbered(count: int, rows: int = 5) -> list[torch.Tensor]:
    """Batches of rows that are numbers in order."""
    return list(torch.arange(float(count)).view(-1, 1).split(rows))


def stream_of(batches: object, *places: str, **settings: int) -> BufferedStream:
    saes = attach(Both(), dict.fromkeys(places, OPEN))
    return BufferedStream(
        ModelRows(saes, places, batches), WORLD, **{"batch_size": 4, "seed": 0, "buffer_rows": 16, **settings}
    )


def take(stream: BufferedStream, count: int, place: str = "one") -> list[float]:
    return [value for _ in range(count) for value in next(stream).activations[place][:, 0].tolist()]


def test_a_buffer_hands_out_what_came_each_row_once():
    buffer = RowBuffer(8, torch.zeros(1, 3, dtype=torch.bfloat16), CPU, seed=0)
    rows = torch.arange(10.0)[:, None].expand(10, 3)
    buffer.add(rows)
    assert (len(buffer), buffer.room) == (8, 0)
    buffer.shuffle()
    first = buffer.take(3)
    assert first.dtype == torch.float32
    buffer.add_leftover()
    assert (len(buffer), buffer.room) == (7, 1)
    buffer.shuffle()
    assert sorted(torch.cat([first, buffer.take(7)])[:, 0].tolist()) == list(range(10))
    assert (len(buffer), buffer.room) == (0, 8)


def test_every_row_goes_out_once_and_they_are_mixed():
    batches = iter(numbered(100))
    stream = stream_of(batches, "one")
    rows = take(stream, 25)
    assert sorted(rows) == list(range(100))
    moved = [abs(place - row) for place, row in enumerate(rows)]
    assert sum(moved) / len(moved) > 2
    with pytest.raises(BatchesEndedError, match="after 100 rows"):
        next(stream)


def test_the_tail_is_kept():
    stream = stream_of(iter(numbered(22)), "one")
    rows = take(stream, 6)
    assert sorted(rows) == list(range(22))
    assert stream.state_dict()["tokens"] == 22


def test_a_list_is_gone_through_again():
    stream = stream_of(numbered(20), "one")
    rows = take(stream, 20)
    assert stream.epochs_passed() >= 3
    counts = [rows.count(number) for number in range(20)]
    assert min(counts) >= 2
    assert max(counts) <= 6


def test_the_order_is_that_of_the_seed():
    orders = [take(stream_of(numbered(100), "one", seed=seed), 10) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_place_beside_others_gets_what_it_gets_alone():
    alone = take(stream_of(numbered(60), "one"), 10)
    class_two = stream_of(numbered(60), "one", "three")
    together = [next(class_two).activations for _ in range(10)]
    assert [value for rows in together for value in rows["one"][:, 0].tolist()] == alone
    assert all(rows["three"].shape == rows["one"].shape for rows in together)


def test_faults_of_what_is_given():
    for batches, places, settings, told in (
        ([], ["one"], {}, "gave no row to train on"),
        (iter([]), ["one"], {}, "the batches ended after 0 rows"),
        ([torch.zeros(0, 1)], ["one"], {}, "gave no row"),
        (numbered(20), ["idle"], {}, "idle did not run in the last forward of Both"),
        (numbered(20), ["one"], {"buffer_rows": 4}, "must hold two batches"),
    ):
        with pytest.raises(GranaryError, match=told):
            stream_of(batches, *places, **settings)
    source = ModelRows(attach(Both(), {"one": OPEN}), ["one"], [])
    with pytest.raises(GranaryError, match="does not divide among 3 processes"):
        BufferedStream(source, World(0, 3, 0, CPU), batch_size=4, seed=0, buffer_rows=16)
