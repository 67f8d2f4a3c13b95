"""The pass against a slow reference that holds everything, for every activation; and what may not change a byte."""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.latents import layout
from shared.latents.folder import Latents
from shared.sae.activation_kinds import ACTIVATION_KINDS
from shared.sae.loading import load
from shared.store import Store
from stage_inspect import job as jobs
from stage_inspect.finish.together import together
from stage_inspect.inspect import inspect
from stage_inspect.scan import batches, keep, state
from stage_inspect.scan.log import join
from tests.inspection import HOOK, LATENTS, content, inspect_config, same_bits, small_sae, small_store

WINDOW, TOP, SAMPLE, TOKENS = 16, 7, 9, 11


@pytest.fixture(scope="module", autouse=True)
def _small_steps() -> Iterator[None]:
    """Several parts, batches, blocks of latents and updates of the keys in a store of 1,344 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "PART_TOKENS", 300)
        patch.setattr(batches, "BATCH_TOKENS", 128)
        patch.setattr(state, "LATENTS_PER_BLOCK", 16)
        patch.setattr("stage_inspect.finish.finish.LATENTS_PER_BLOCK", 16)
        patch.setattr(state, "LOG_BYTES", 20_000)
        patch.setattr(keep, "LEAST_PENDING", 50)
        patch.setattr(keep, "ROWS", 7)
        patch.setattr("stage_inspect.finish.together.PAIRS", 300)
        patch.setattr("stage_inspect.finish.together.CELLS", 11 * LATENTS)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small_store(tmp_path_factory.mktemp("inspect") / "store")


class Slow:
    """Everything by loops over single tokens."""

    def __init__(self, store: Store, sae: Any) -> None:
        self.T = store.seq_len
        self.rows: list[dict[str, Any]] = []  # trainable positions, with what fires
        reader = batches.BatchReader(store, sae, type(sae.config.sites).of(HOOK), WINDOW, True)
        contexts = store.contexts("all")
        tokens, masks, segments = store.tokens(contexts), store.mask(contexts), store.segments(contexts)
        for batch in reader.batches(contexts):
            fires = {
                int(batch.places.place_P[at]): {
                    int(latent): float(value)
                    for latent, value in zip(batch.indices_NK[row], batch.values_NK[row], strict=True)
                    if latent >= 0
                }
                for row, at in enumerate(batch.at_N)
            }
            for place, latents in fires.items():
                context, t = divmod(place, self.T)
                start = next(s for s in range(t, -1, -1) if s == 0 or segments[context][s - 1] != segments[context][t])
                end = next(
                    e for e in range(t + 1, self.T + 1) if e == self.T or segments[context][e] != segments[context][t]
                )
                assert masks[context][t]
                self.rows.append(
                    {"context": context, "t": t, "start": start, "end": end,
                     "window": start + (t - start) // WINDOW * WINDOW,
                     "token": int(tokens[context][t]), "next": int(tokens[context][t + 1]) if t + 1 < end else None,
                     "heldout": store.shard_of(context) in store.heldout_shards, "latents": latents}
                )  # fmt: skip
        self.tokens = {(int(c), t): int(tokens[n][t]) for n, c in enumerate(contexts) for t in range(self.T)}

    def of(self, latent: int) -> list[tuple[dict[str, Any], float]]:
        return [(row, row["latents"][latent]) for row in self.rows if latent in row["latents"]]

    def groups(self, latent: int, key: str) -> dict[tuple[int, int], tuple[dict[str, Any], float]]:
        """The earliest of the largest of each window (key "window") or document (key "start")."""
        best: dict[tuple[int, int], tuple[dict[str, Any], float]] = {}
        for row, value in self.of(latent):
            place = (row["context"], row[key])
            if place not in best or value > best[place][1]:
                best[place] = (row, value)
        return best


@pytest.mark.parametrize(
    "activation",
    [
        pytest.param(name, marks=() if name in ("topk", "relu", "signed_topk") else pytest.mark.slow)
        for name in ACTIVATION_KINDS
    ],
)
def test_equal_to_brute_force(store: Store, tmp_path: Path, activation: str) -> None:
    sae = small_sae(tmp_path / "sae", activation)
    inspect(inspect_config(tmp_path, **{"store.url": store.url}))
    latents = Latents.open(tmp_path / "latents")
    slow = Slow(store, load(tmp_path / "sae"))
    table = latents.table
    assert latents.meta.counts["tokens"] == len(slow.rows)
    assert latents.meta.counts["documents"] == len({(row["context"], row["start"]) for row in slow.rows})
    assert latents.meta.counts["windows"] == len({(row["context"], row["window"]) for row in slow.rows})
    assert latents.meta.counts["tokens_heldout"] == sum(row["heldout"] for row in slow.rows)
    edges = latents.histogram_edges
    for latent in range(LATENTS):
        fired = slow.of(latent)
        values = np.array([value for _, value in fired])
        rows = [row for row, _ in fired]
        assert table["fired"][latent] == len(fired)
        assert table["fired_heldout"][latent] == sum(row["heldout"] for row in rows)
        assert table["contexts"][latent] == len({row["context"] for row in rows})
        assert table["windows"][latent] == len(slow.groups(latent, "window"))
        assert table["documents"][latent] == len(slow.groups(latent, "start"))
        sums = [latents.array(f"table/{name}").row(latent) for name in layout.SUMS]
        assert np.allclose(sums, [(values**power).sum() for power in range(1, 5)], rtol=1e-12)
        assert table["max"][latent] == (values.max() if len(values) else 0)
        found = latents.latent(latent)
        assert same_bits(found.histogram, np.histogram(values, edges)[0])
        numbers = [row["t"] - row["start"] for row in rows]
        assert same_bits(found.positions, np.histogram(numbers, [*latents.meta.position_edges, 1 << 30])[0])
        check_records(latents, slow, latent)
    assert not table["fired"][3]
    check_together(latents, slow)
    del sae


def check_records(latents: Latents, slow: Slow, latent: int) -> None:
    """The top of all documents, and a sample of all windows, each with its text and activations."""
    by_place = {(row["context"], row["t"]): value for row, value in slow.of(latent)}
    best = sorted(slow.groups(latent, "start").values(), key=lambda one: (-one[1], one[0]["context"], one[0]["t"]))
    top, sample = latents.top(latent), latents.sample(latent)
    assert [(one.value, one.context, one.position) for one in top] == [
        (value, row["context"], row["t"]) for row, value in best[:TOP]
    ]
    windows = slow.groups(latent, "window")
    peaks = {(row["context"], row["t"]): value for row, value in windows.values()}
    assert len(sample) == min(SAMPLE, len(windows))
    assert len({(one.context, one.position) for one in sample}) == len(sample)
    assert all(peaks[one.context, one.position] == one.value for one in sample)
    assert [one.value for one in sample] == sorted((one.value for one in sample), reverse=True)
    for one in top + sample:
        row = next(row for row in slow.rows if (row["context"], row["t"]) == (one.context, one.position))
        low, high = max(row["start"], one.position - 11), min(row["end"], one.position + 5)
        assert (one.start, len(one.tokens)) == (low, high - low)
        assert one.tokens.tolist() == [slow.tokens[one.context, t] for t in range(low, high)]
        expected = [by_place.get((one.context, t), 0) for t in range(low, high)]
        assert np.allclose(one.values, expected, rtol=1e-3)
    for one in latents.silent(latent, 4):
        assert not any((one.context, one.start + number) in by_place for number in range(len(one.tokens)))
    found = latents.latent(latent)
    fired = slow.of(latent)
    assert sum(1 for _ in fired) >= latents.array("tokens/sampled").row(latent) == min(TOKENS, len(fired))
    if len(fired) <= TOKENS:
        assert {one.token: one.count for one in found.tokens} == Counter(row["token"] for row, _ in fired)
        following = Counter(row["next"] for row, _ in fired if row["next"] is not None)
        assert {one.token: one.count for one in found.next_tokens} == following


def check_together(latents: Latents, slow: Slow) -> None:
    """Over the sampled tokens, which are found again by the same chance."""
    chance = state.Chance(LATENTS, type("S", (), {"seed": 0})())
    total = len(slow.rows)
    places = np.array([row["context"] * slow.T + row["t"] for row in slow.rows])
    chosen = chance.place(state.TOGETHER, places) < state.limit(min(1.0, 400 / total))
    dense = np.zeros((int(chosen.sum()), LATENTS))
    for number, row in enumerate(itertools.compress(slow.rows, chosen)):
        for latent, value in row["latents"].items():
            dense[number, latent] = value
    N, fires = len(dense), dense > 0
    assert latents.meta.together_tokens == N
    both = fires.T.astype(float) @ fires
    n = fires.sum(0)
    with np.errstate(all="ignore"):
        pearson = np.corrcoef(dense.T)
        scores = {
            "jaccard": both / (n[:, None] + n - both),
            "npmi": np.log(N * both / (n[:, None] * n)) / -np.log(both / N),
            "pearson": pearson,
        }
    np.fill_diagonal(both, 0)
    for latent in range(LATENTS):
        found = latents.latent(latent)
        for name, score in scores.items():
            related = getattr(found, name)
            expected = np.sort(score[latent][both[latent] >= 5])[::-1][: layout.NEAREST]
            assert np.allclose([one.value for one in related], expected, atol=1e-6)
            assert np.allclose([score[latent, one.latent] for one in related], expected, atol=1e-6)
            assert all(one.count is None or one.count == both[latent, one.latent] for one in related)


def test_no_order_and_no_kill_changes_a_byte(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts in any order, by processes that know of one another's or not, ended after any write."""
    small_sae(tmp_path / "sae")
    url = {"store.url": store.url}
    inspect(inspect_config(tmp_path, **url))
    whole = content(tmp_path / "latents")
    from shared.store.io.local import LocalIO
    from stage_inspect import inspect as stage

    class Killed(Exception):  # noqa: N818
        pass

    put, scan = LocalIO.put, stage.scan
    rng = np.random.default_rng(0)
    for kill_at in [1, 4, 6, rng.integers(7, 120)]:
        left = [int(kill_at)]

        def failing(self: LocalIO, key: str, data: Any, *, replace: bool = False, left: list[int] = left) -> bool:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return put(self, key, data, replace=replace)

        def shuffled(
            io: Any, job: Any, reader: Any, settings: Any, identity: str, numbers: list[int], tell: Any
        ) -> None:
            scan(io, job, reader, settings, identity, rng.permutation(numbers).tolist(), tell)

        monkeypatch.setattr(LocalIO, "put", failing)
        monkeypatch.setattr(stage, "scan", shuffled)
        place = {"latents.url": tmp_path / f"killed-{kill_at}"}
        with suppress(Killed):
            inspect(inspect_config(tmp_path, **url, **place))
        monkeypatch.setattr(LocalIO, "put", put)
        inspect(inspect_config(tmp_path, **url, **place))
        assert content(place["latents.url"]) == whole, kill_at


def test_seldom_and_often_meeting_latents_are_compared_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    N, F = 300, 50
    fires = rng.random((N, F)) < rng.random(F) ** 3
    latent, value = np.nonzero(fires)[1], rng.exponential(size=int(fires.sum()))
    found = []
    for filled in (0, 1 / 8, np.inf):  # all by tables, some, none
        monkeypatch.setattr("stage_inspect.finish.together.FILLED", filled)
        monkeypatch.setattr("stage_inspect.finish.together.PAIRS", 3000 if filled < np.inf else 1 << 20)
        found.append(join(list(together(fires.sum(1), latent, value, F))))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, column in other.items():
            assert np.allclose(column, found[0][name], rtol=1e-6), name


def test_the_sample_is_unbiased() -> None:
    """Each window of a latent is as likely as any other to be among the smallest keys, whatever its value."""
    chance = state.Chance(2000, type("S", (), {"seed": 1})())
    windows = np.arange(200) * 64
    hits = np.zeros(10)
    for latent in range(2000):
        key = chance.pair(state.SAMPLE, np.full(200, latent), chance.place(state.SAMPLE, windows))
        chosen = np.argsort(key)[:20]
        hits += np.bincount(chosen // 20, minlength=10)
    expected = 2000 * 20 / 10
    # 9 degrees of freedom, p = 1e-3; drawn without replacement, which only lowers it.
    assert ((hits - expected) ** 2 / expected).sum() < 27.9


def test_keys_are_the_smallest_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    smallest = keep.Smallest(30, 4)
    latent, key = rng.integers(0, 29, 3000), rng.integers(0, 1000, 3000).astype(np.uint32)
    for start in range(0, 3000, 100):
        part = slice(start, start + 100)
        wanted = smallest.wanted(latent[part], key[part])
        smallest.add(latent[part][wanted], key[part][wanted])
    smallest.update()
    for one in range(30):
        expected = np.sort(key[latent == one])[:4]
        assert smallest.keys_FK[one].tolist() == [*expected, *[keep.LARGEST] * (4 - len(expected))]


def test_bins_are_thirds_of_octaves() -> None:
    from stage_inspect.scan.pairs import bins, falling

    edges = np.exp2(-3 + np.arange(63) / 3)
    value = np.concatenate([edges * (1 + 1e-6), edges * (1 - 1e-6), [0, -1, 1e-30, 1e30]]).astype(np.float32)
    expected = np.searchsorted(np.concatenate([[-np.inf], edges]), value, side="right") - 1
    assert bins(value, -3).tolist() == np.clip(expected, 0, 63).tolist()
    ordered = np.array([np.inf, 3, 1, 0.5, 1e-40, 0, -1e-40, -1, -5], np.float32)
    assert (np.diff(falling(ordered).astype(np.int64)) > 0).all()


def test_the_encoder_is_asked_for_whole_contexts(store: Store, tmp_path: Path) -> None:
    sae = small_sae(tmp_path / "sae")
    reader = batches.BatchReader(store, sae, type(sae.config.sites).of(HOOK), WINDOW, True)
    one = list(reader.batches(store.contexts("all")))
    assert all(len(batch.at_N) <= 2 * store.seq_len for batch in one)
    x = torch.zeros(0, 24)
    assert reader.encode(x)[0].shape == (0, 0)


def test_an_example_record_takes_20_bytes_at_most(tmp_path: Path) -> None:
    """With as many examples of a latent, and as long windows, as runs have; several tokens of each are active."""
    small_store(tmp_path / "store", num_contexts=60, seq_len=256)
    small_sae(tmp_path / "sae", d_latent=200, k=20)
    inspect(inspect_config(tmp_path, **{"latents.window": 64, "latents.top": 100, "latents.sample": 128}))
    folder = tmp_path / "latents"
    records = len(Latents.open(folder).array("examples/value").all())
    assert records > 100 * 200
    stored = sum(len(data) for path, data in content(folder).items() if path.startswith(("examples/", "active/")))
    assert stored <= 20 * records
