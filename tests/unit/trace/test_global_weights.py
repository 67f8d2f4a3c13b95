"""Global weights against brute force over all pairs, against the graph's own edges, and on a planted circuit."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.latents.global_weights import Connection, GlobalWeights, GlobalWeightsWriter, WeightsMeta
from shared.lm import model_identity
from shared.lm.hookpoint import HookPoint
from shared.lm.linear_parts import linear_parts
from shared.sae import Dictionary
from shared.store import Store, StorePlan
from shared.store.io.open import open_io
from stage_trace.places import places_of
from stage_trace.session import Source
from stage_trace.sweep import sweep
from stage_trace.targets import Features
from stage_trace.weights import build, firing, job
from stage_trace.weights.__main__ import main
from stage_trace.weights.build import write_weights
from stage_trace.weights.firing import Firing, Together, unpadded
from stage_trace.weights.layers import Layer, layers_of, written
from tests.tracing import D, bundled_transcoder, make_clt, make_model, make_transcoder, of_dictionaries

N, MOST = 40, 5
SETS = {
    "transcoders": lambda depth: [make_transcoder(layer) for layer in range(depth)],
    "skip": lambda depth: [make_transcoder(layer, skip=True) for layer in range(depth)],
    "clt": lambda depth: [make_clt(depth)],
    "stream": lambda depth: [make_transcoder(layer, read="resid_mid", skip=True) for layer in range(depth)],
}


def as_source(dictionary: Dictionary) -> Source:
    return Source("it", places_of(dictionary.config, "it"), lambda: dictionary)


def fire(dictionaries: Sequence[Dictionary]) -> dict[int, Firing]:
    """On random tokens of every site."""
    generator, found = torch.Generator().manual_seed(5), {}
    for dictionary in dictionaries:
        picks = dictionary.encode(3 * torch.randn(N, dictionary.widths.d_in, generator=generator))
        parts = dictionary.split(picks.values, picks.indices)
        for place, group, (values, indices) in zip(as_source(dictionary).places, dictionary.groups, parts, strict=True):
            found[place.own.layer] = Firing.of(
                [unpadded(indices[some], values[some]) for some in (slice(9), slice(9, None))], group.num_latents
            )
    return found


def dense(one: Firing, num_latents: int) -> Tensor:
    found = torch.zeros(N, num_latents, dtype=torch.float64)
    for token in range(N):
        for at in range(int(one.first_N[token]), int(one.first_N[token + 1])):
            found[token, one.latent_P[at]] = one.value_P[at]
    return found


def virtual(layers: Sequence[Layer], source: Layer, i: int, target: Layer, j: int) -> float:
    """One weight, step by step along the path."""
    stream = torch.zeros(D, dtype=torch.float64)
    for layer in layers:
        if source.number <= layer.number < target.number:
            read = stream if layer.norm is None else layer.norm.factor * stream * layer.norm.norm.weight_D
            if layer.skip is not None:
                stream = stream + layer.skip @ read
            if HookPoint(layer.number, "mlp_out") in source.weights.place.writes:
                stream = stream + source.weights.decoder(HookPoint(layer.number, "mlp_out"), torch.tensor([i]))[0]
    read = stream if target.norm is None else target.norm.factor * stream * target.norm.norm.weight_D
    return float(read @ target.weights.encoder(torch.tensor([j]))[0])


def written_to(folder: Path, layers: Sequence[Layer], fired: dict[int, Firing], most: int = MOST) -> GlobalWeights:
    writer = GlobalWeightsWriter(open_io(folder), most)
    write_weights(layers, fired, N, most, writer)
    described = [
        {"layer": one.number, "num_latents": one.num_latents, "dictionary": "", "sha256": None, "first": 0,
         "norm_factor": 1.0} for one in layers
    ]  # fmt: skip
    writer.finish(WeightsMeta(layers=described, most=most, tokens=N, store={}, model={}, versions={}))
    return GlobalWeights.open(folder)


@pytest.mark.parametrize("kind", SETS)
def test_both_directions_equal_brute_force_over_all_pairs(tmp_path: Path, kind: str) -> None:
    model = make_model("llama")
    dictionaries = SETS[kind](depth := int(model.config.num_hidden_layers))
    layers = layers_of(
        [as_source(one) for one in dictionaries], linear_parts(model), {n: 0.5 + 0.2 * n for n in range(depth)}
    )
    fired = fire(dictionaries)
    weights = written_to(tmp_path, layers, fired)
    acts = {layer.number: dense(fired[layer.number], layer.num_latents) for layer in layers}
    every: list[tuple[tuple[int, int], tuple[int, int], Connection]] = []
    for target in layers:
        for source in layers[: layers.index(target)]:
            for j in range(target.num_latents):
                a_j = acts[target.number][:, j]
                for i in range(source.num_latents):
                    a_i, weight = acts[source.number][:, i], virtual(layers, source, i, target, j)
                    both = int(((a_i > 0) & (a_j > 0)).sum())
                    if both:
                        twera = weight * float(a_i @ a_j) / float(a_j.sum())
                        era = weight * float(a_i[a_j > 0].sum()) / N
                        every.append(
                            ((source.number, i), (target.number, j), Connection(0, 0, twera, era, weight, both))
                        )
    assert len(every) > 100
    checked = 0
    for layer in layers:
        for latent in range(layer.num_latents):
            for end, found in enumerate((weights.targets(layer.number, latent), weights.sources(layer.number, latent))):
                mine = [(pair[1 - end], pair[2]) for pair in every if pair[end] == (layer.number, latent)]
                mine.sort(key=lambda one: -abs(one[1].twera))
                assert [(one.layer, one.latent) for one in found] == [place for place, _ in mine[:MOST]]
                for got, (_, expected) in zip(found, mine[:MOST], strict=True):
                    assert got.both == expected.both
                    for name in ("twera", "era", "weight"):
                        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=1e-5)
                        checked += 1
    assert checked > 300


FAMILIES_AND_SETS = [
    (family, kind)
    for family in ("llama", "gemma2", "pythia")
    for kind in SETS
    if (family, kind) != ("pythia", "stream")  # its branches are parallel: it has no resid_mid
]


@pytest.mark.parametrize(("family", "kind"), FAMILIES_AND_SETS)
def test_a_virtual_weight_is_the_graphs_edge_where_there_is_no_attention(family: str, kind: str) -> None:
    """At one position, with its own norm factors: an edge is the source's activation times the virtual weight."""
    model = make_model(family)
    for layer in linear_parts(model).layers:
        for parameter in layer.heads.output.parameters():
            parameter.data.zero_()
    dictionaries = SETS[kind](int(model.config.num_hidden_layers))
    traced = of_dictionaries(model, dictionaries)
    features = Features.of(traced.replacement)
    rows = sweep(
        traced.parts, traced.recording, traced.replacement, traced.columns, features[torch.arange(len(features))]
    )
    position, compared = 3, 0
    factors = {n: float(traced.recording.scales[n, "mlp"][position]) for n in range(len(traced.parts.layers))}
    layers = {one.number: one for one in layers_of([as_source(one) for one in dictionaries], traced.parts, factors)}
    held = [(n, *where) for n, one in enumerate(traced.replacement.stand_ins) for where in _places(one.latents)]
    for row, (target, at, j, _) in enumerate(held):
        for column, (source, where, i, value) in enumerate(held):
            if at == where == position and source < target:
                path_D = written(layers, layers[source], target)[i]
                encoder_D = layers[target].encoders(slice(j, j + 1))[0]
                expected = value * float(path_D @ encoder_D)
                assert float(rows.rows_BS[row, column]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
                compared += 1
    assert compared > 3


def _places(latents: object) -> list[tuple[int, int, float]]:
    columns = (getattr(latents, name).tolist() for name in ("position_N", "latent_N", "value_N"))
    return list(zip(*columns, strict=True))


def test_small_tiles_give_the_same_and_no_tile_is_larger_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    dictionaries = SETS["transcoders"](int(model.config.num_hidden_layers))
    layers = layers_of([as_source(one) for one in dictionaries], linear_parts(model), dict.fromkeys(range(9), 1.0))
    fired = fire(dictionaries)
    written_to(tmp_path / "whole", layers, fired)
    cells = []

    def count(target: Firing, block: slice, source: Firing) -> Together:
        found = Together.count(target, block, source)
        cells.append(found.both.numel())
        return found

    monkeypatch.setattr(build, "CELLS", 96)
    monkeypatch.setattr(firing, "TERMS", 7)
    monkeypatch.setattr(build, "Together", type("Counted", (), {"count": staticmethod(count)}))
    written_to(tmp_path / "tiles", layers, fired)
    assert len(cells) > 10
    assert max(cells) <= 96
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "tiles" / path.relative_to(tmp_path / "whole")).read_bytes(), path


PLANTED, PLANTED_TO = (0, 5), (2, 7)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Transcoders of the bundled model in which latent 5 of layer 0 writes what latent 7 of layer 2 reads, and a store
    of random activations in which the two fire on the same tokens."""
    folder = tmp_path_factory.mktemp("planted")
    made = {layer: bundled_transcoder(layer) for layer in (0, 1, 2)}
    model_weight = linear_parts_of_bundled(2)
    with torch.no_grad():
        for one in made.values():
            one.b_enc.zero_()
        reads = made[2].W_enc[PLANTED_TO[1]] * model_weight
        made[0].W_dec[PLANTED[1]] = 3 * reads / reads.norm() * made[0].W_dec.norm(dim=1).mean()
    for layer, one in made.items():
        one.save_pretrained(folder / f"layer{layer}", {"model": model_identity("bundled")})
    plan = StorePlan(
        num_contexts=8, seq_len=64, hooks={f"layers.{layer}.mlp_in": 128 for layer in made}, dtype="float32",
        shard_contexts=4, chunk_tokens=64, codec="none", heldout_fraction=0.0, heldout_placement="last",
        provenance={"model": dict(model_identity("bundled"))}, versions={},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    shape = (8, 64)
    tokens = torch.randint(3, 500, shape, generator=generator, dtype=torch.int32).numpy()
    store = Store.create(folder / "store", plan, tokens, np.ones(shape, bool), np.zeros(shape, np.int32))
    together = (torch.rand(shape, generator=generator) < 0.3)[..., None]
    for shard in store.pending():
        span = store.shard_contexts(shard)
        sites = {}
        for layer, latent in ((0, PLANTED[1]), (1, 0), (2, PLANTED_TO[1])):
            x = torch.randn(len(span), 64, 128, generator=generator)
            if layer != 1:
                row = made[layer].W_enc[latent]
                x = x + together[span.start : span.stop] * 8 * row / row.norm() / row.norm()
            sites[f"layers.{layer}.mlp_in"] = x
        store.write_shard(shard, sites)
    return folder, folder / "store"


def linear_parts_of_bundled(layer: int) -> Tensor:
    """The weight of the norm that the layer's MLP reads behind."""
    from shared.lm import load_causal_lm

    return linear_parts(load_causal_lm("bundled")).layers[layer].mlp_norm.weight_D.detach()


def made_from(planted: tuple[Path, Path], out: Path, *more: str) -> GlobalWeights:
    folder, store = planted
    runs = [str(folder / f"layer{layer}") for layer in (0, 1, 2)]
    main([*runs, "--store", str(store), "--out", str(out), "--tokens", "512", "--device", "cpu", *more])
    return GlobalWeights.open(out)


def test_a_planted_circuit_comes_first_in_both_directions(
    planted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = made_from(planted, tmp_path / "one")
    first, *others = weights.sources(*PLANTED_TO)
    assert (first.layer, first.latent) == PLANTED
    assert first.twera > 3 * abs(others[0].twera)
    fed = weights.targets(*PLANTED)[0]
    assert (fed.layer, fed.latent) == PLANTED_TO
    assert fed.twera == pytest.approx(first.twera)
    assert first.both > 100
    assert all(one.layer < 2 for one in weights.sources(*PLANTED_TO))
    assert weights.sources(0, 3) == weights.targets(2, 3) == []
    assert "288 latents" in capsys.readouterr().out
    made_from(planted, tmp_path / "two")
    files = [path for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path


def test_the_page_is_one_file_that_shows_the_circuit(planted: tuple[Path, Path], tmp_path: Path) -> None:
    made_from(planted, tmp_path)
    page = (tmp_path / "weights.html").read_text()
    assert not re.search(r"https?:|//\w+\.|url\(|@import", page)
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(data["latents"]) == 288
    held = next(one for one in data["latents"] if (one[0], one[1]) == PLANTED_TO)
    assert held[6][0][0] == "0/5"
    code = Path(build.__file__).parents[1] / "assets" / "weights.js"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", code.read_text())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{run}/layer0"], "between layers"),
        (["{run}/layer0", "{run}/layer0", "{run}/layer1", "--most", "0"], "--most 0: choose from 1"),
        (["{run}/layer0", "{run}/layer1", "--tokens", "0"], "--tokens 0: at least 1"),
        (["{run}/layer0", "{run}/layer9"], "layer9"),
    ],
)
def test_wrong_input_is_one_line(
    planted: tuple[Path, Path], tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [one.replace("{run}", str(planted[0])) for one in arguments]
    with pytest.raises(SystemExit) as exit_:
        main([*given, "--store", str(planted[1]), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_layers_of_a_clt_are_planned_to_wait_at_once() -> None:
    """Transcoders are read one after the other: of equal firing they take less."""
    parts = linear_parts(make_model("llama"))
    told = {}
    for kind in ("transcoders", "clt"):
        made = SETS[kind](2)
        sources = [replace(as_source(one), config=replace(one.config, k=4 if kind == "clt" else 2)) for one in made]
        (line,) = job.plan(layers_of(sources, parts, dict.fromkeys(range(9), 1.0)), 1_000_000, sources, 4)
        told[kind] = re.search(r"firing of the sample ([\d.]+) MB", line)
    assert [float(found[1]) for found in told.values() if found] == [160.0, 184.0]


def test_a_site_that_the_store_lacks_is_told(planted: tuple[Path, Path], tmp_path: Path) -> None:
    bundled_transcoder(3).save_pretrained(tmp_path / "layer3", {"model": model_identity("bundled")})
    from stage_trace.sources import find_sources
    from stage_trace.weights.job import check_fit

    with pytest.raises(GranaryError, match=r"reads layers\.3\.mlp_in, which .* lacks"):
        check_fit(find_sources([planted[0] / "layer0", tmp_path / "layer3"]), Store.open(planted[1]))


def test_a_folder_from_a_stranger_is_data_that_is_checked(planted: tuple[Path, Path], tmp_path: Path) -> None:
    weights = made_from(planted, tmp_path)
    with pytest.raises(GranaryError, match="no latent 96 of layer 0"):
        weights.sources(0, 96)
    with pytest.raises(GranaryError, match="no global weights at"):
        GlobalWeights.open(tmp_path / "nothing")
    meta = tmp_path / "meta.json"
    record = json.loads(meta.read_text())
    for change, told in (
        ({"granary_global_weights": 2}, "upgrade"),
        ({"layers": record["layers"][::-1]}, "damaged"),
        ({"most": 10**9}, "damaged"),
        ({"layers": [{"layer": 0}]}, "lacks the key"),
    ):
        meta.write_text(json.dumps({**record, **change}))
        with pytest.raises(GranaryError, match=told):
            GlobalWeights.open(tmp_path)
