"""Planted latents whose scores are known, and every formula against one that is written out token by token."""

import itertools

import numpy as np
import pytest
import torch

from shared.sae.config import SAEConfig
from shared.sae.rows import decoder_rows, raw_rows
from shared.sae.sites import Sites
from shared.sae.variants import SAE
from stage_eval.results.supervised import SupervisedFigures
from stage_eval.supervised.ablation import ablated, along, at_random, chosen
from stage_eval.supervised.codes import Codes
from stage_eval.supervised.labels import Pair
from stage_eval.supervised.logistic import Probe
from stage_eval.supervised.perturbation import perturb
from stage_eval.supervised.probing import probe_concept
from stage_eval.supervised.removal import remove
from stage_eval.supervised.resamples import ranged
from stage_eval.supervised.sample import Task
from stage_eval.supervised.score import NO_ROWS, score
from stage_eval.supervised.splitting import Written, absorption, shares, split
from tests.labelled import codes, concept, material, noise
from tests.variants import OF_TOKENS, make

N, D, F = 480, 8, 12
YES = np.arange(N) % 4 < 2


def test_one_latent_for_a_concept_is_found_and_tells_it_perfectly() -> None:
    value_NF = noise(N, F).abs()
    value_NF[:, 5] = torch.from_numpy(YES) * 2.0
    task = concept(YES)
    tokens = np.where(YES, 3, np.where(np.arange(N) % 8 < 4, 3, 4))  # says yes to half of the others as well
    of = material(task, noise(N, D) + torch.from_numpy(YES)[:, None], token_N=tokens)
    best, found = probe_concept(of, codes(value_NF), task)
    assert best[0] == 5
    assert found["latents 1"][0] == found["latents 5"][0] == found["activation"][0] == found["coordinates 1"][0] == 1
    assert found["token"][0] == 0.75
    whole = split(of, codes(value_NF), task)
    assert (whole.main, whole.f1[0], whole.number[0], whole.number.max()) == ([5], 1, 1, 1)


def test_latents_that_fire_by_chance_are_at_chance() -> None:
    task = concept(YES)
    _, found = probe_concept(material(task, noise(N, D)), codes(noise(N, F)), task)
    for name in ("latents 1", "latents 5", "activation"):
        interval = ranged(found[name]).interval
        assert interval is not None
        assert interval[0] < 0.5 < interval[1] or abs(found[name][0] - 0.5) < 0.07
    assert found["token"][0] == 0.5


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_a_concept_is_split_into_as_many_latents_as_share_it(parts: int) -> None:
    value_NF = noise(N, F, scale=0.001).abs()
    for part in range(parts):
        value_NF[YES & (np.arange(N) // 4 % parts == part), 3 + part] = 1.0
    task = concept(YES)
    found = split(material(task, noise(N, D)), codes(value_NF), task)
    assert sorted(found.main) == list(range(3, 3 + parts))
    assert found.number[0] == parts
    assert found.f1[0] == 1


def planted_absorption(share: float) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Latent 0 writes the concept, but on a share of it latent 1, which writes the concept and something else."""
    rows = torch.zeros(F, D, dtype=torch.float64)
    rows[0, 0] = rows[1, 0] = rows[1, 1] = 1
    for latent in range(2, F):
        rows[latent, 2 + latent % (D - 2)] = 1
    value_NF = torch.zeros(N, F, dtype=torch.float64)
    is_absorbed = YES & (np.arange(N) // 4 % 20 < 20 * share)
    value_NF[YES & ~is_absorbed, 0] = 3
    value_NF[is_absorbed, 1] = 3
    value_NF[torch.arange(N), 2 + torch.arange(N) // 4 % 7 % (F - 2)] = 0.5
    return is_absorbed, value_NF, rows


def test_absorbed_tokens_are_counted() -> None:
    is_absorbed, value_NF, rows = planted_absorption(0.2)
    task, base = concept(YES), torch.full((1, D), 5.0)
    of = material(task, value_NF @ rows + base + noise(N, D, scale=1e-4))
    full_n, fraction_n, document_n = absorption(of, codes(value_NF), task, [0], Written(rows, base.expand(N, D)))
    tested = np.flatnonzero(YES & of.sample.is_test_N)
    assert len(full_n) == len(tested)
    assert (full_n == is_absorbed[tested]).all()
    assert np.allclose(fraction_n, is_absorbed[tested], atol=1e-3)
    assert (document_n == of.sample.document_N[tested]).all()
    both, _, _ = absorption(of, codes(value_NF), task, [0, 1], Written(rows, base.expand(N, D)))
    assert (both == 0).all()  # split, not absorbed


def slow_shares(
    a_F: np.ndarray, along_F: np.ndarray, cosine_F: np.ndarray, main: list[int], x: float
) -> tuple[float, float]:
    """Of one token, as SAEBench writes it."""
    proj_F = a_F * along_F
    others = [one for one in range(len(a_F)) if one not in main and cosine_F[one] >= 0.1 and proj_F[one] > 0]
    S, m = sum(sorted(proj_F[others])[-3:]), sum(proj_F[main])
    if m >= x or S / x < 0.4:
        fraction = 0.0
    elif m <= 0:
        fraction = 1.0
    else:
        A = min(S, x - m)
        fraction = A / (A + m)
    top = int(proj_F.argmax())
    is_full = (a_F[main] < 1e-8).all() and cosine_F[top] >= 0.025 and x >= 0 and proj_F[top] / x >= 0.4
    return float(is_full), fraction


def test_absorption_is_saebenchs_formula() -> None:
    rng = np.random.default_rng(0)
    value_NF = rng.random((300, F)) * (rng.random((300, F)) < 0.4)
    along_F, cosine_F = rng.normal(size=F), rng.uniform(-0.3, 0.6, F)
    along_F = np.abs(along_F) * np.sign(cosine_F)
    main, there = [2, 7], np.abs(rng.normal(size=300)) + 0.01
    found = shares(codes(torch.from_numpy(value_NF)), np.arange(300), along_F, cosine_F,
                   np.isin(np.arange(F), main), there)  # fmt: skip
    wanted = [slow_shares(value_NF[n], along_F, cosine_F, main, there[n]) for n in range(300)]
    assert np.allclose(np.transpose(wanted), found)
    assert {0.0, 1.0} <= set(found[1].tolist())
    assert 0 < found[0].mean() < 1
    assert ((found[1] > 0) & (found[1] < 1)).any()


@pytest.mark.parametrize("normalisation", ["none", "centre_scale", "layer_norm"])
def test_ablating_moves_the_logit_as_decoding_without_the_latents_does(normalisation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    config = SAEConfig(d_model=D, d_latent=F, k=4, normalisation=normalisation, sites=Sites.of("layers.0.resid_post"))
    sae = SAE(config, generator=generator)
    if normalisation == "centre_scale":
        sae.input_scale.fill_(0.3)
        sae.input_mean.normal_(generator=generator)
    with torch.no_grad():
        sae.b_dec.normal_(generator=generator)
    x_ND = torch.randn(50, D, generator=generator) * 4
    found, base_ND = Codes.of(sae, x_ND, torch.device("cpu"))
    assert torch.allclose(base_ND, sae.decode(sae.encode(x_ND)) - (sae(x_ND).x_hat - base_ND), atol=1e-5)
    latents, probe, rows = [1, 4, 5, 9], Probe(torch.randn(D, generator=generator).double(), 0.3), np.arange(50)
    gone = sae.encode(x_ND)
    kept = torch.where(torch.isin(gone.indices, torch.tensor(latents)), 0, gone.values)
    without = type(gone)(kept, gone.indices, gone.token_mean, gone.token_scale)
    slow_ND = x_ND - sae.decode(gone) + sae.decode(without)
    row_FD = raw_rows(sae, decoder_rows(sae)).double()
    fast_n = ablated(probe.logits(x_ND).numpy(), found, rows, along(probe, row_FD), latents)
    assert np.allclose(fast_n, probe.logits(slow_ND).numpy(), atol=1e-4)
    dense_NF = gone.to_dense(F).double().numpy()
    assert np.allclose(found.columns(range(F), rows).numpy(), dense_NF)
    is_yes = rows % 3 == 0
    scale_N = np.ones(50) if gone.token_scale is None else gone.token_scale[:, 0].numpy()
    assert np.allclose(found.difference(is_yes, rows), dense_NF[is_yes].mean(0) - dense_NF[~is_yes].mean(0))
    written_NF = dense_NF * scale_N[:, None]
    apart_F = written_NF[is_yes].mean(0) - written_NF[~is_yes].mean(0)
    assert np.allclose(found.difference(is_yes, rows, written=True), apart_F)
    assert np.allclose(found.energy(rows), (dense_NF**2).sum(0))


KINDS = Task("kinds", ("a", "b", "c"), np.arange(N) // 2 % 3)


def planted_kinds(*, entangled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Kind k is direction k, written by two latents of its own, or by one latent for all kinds at once."""
    rows = torch.zeros(F, D, dtype=torch.float64)
    value_NF = torch.zeros(N, F, dtype=torch.float64)
    for kind in range(3):
        is_kind = KINDS.group_N == kind
        if entangled:
            rows[kind] = torch.eye(D)[:3].sum(0)
            value_NF[is_kind, kind] = 1e-9
        else:
            rows[2 * kind, kind] = rows[2 * kind + 1, kind] = 1
            value_NF[is_kind, 2 * kind] = value_NF[is_kind, 2 * kind + 1] = 2
    rows[8:, 6], value_NF[:, 8:] = 1, 1
    return rows, value_NF


def test_kinds_with_latents_of_their_own_are_perturbed_alone() -> None:
    rows, value_NF = planted_kinds(entangled=False)
    x_ND = torch.eye(D, dtype=torch.float64)[KINDS.group_N] * 4 + noise(N, D)
    found = perturb(material(KINDS, x_ND), codes(value_NF), KINDS, rows)
    assert found.ablated == [2, 5, 10]
    # Without its two latents a kind is nowhere told from the others: the probe always says no, and is right of half.
    assert [one.value for one in found.score] == [0.5, 0.5, 0.5]
    assert [one.interval for one in found.score] == [(0.5, 0.5)] * 3
    assert [kind.kind for kind in found.kinds] == ["a", "b", "c"]
    for kind in found.kinds:
        assert kind.accuracy.value == 1
        assert [one.value for one in kind.own] == [0.5] * 3
        assert [one.value for one in kind.others] == [0] * 3
    assert abs(found.random[0].value or 0) < 0.25


def test_latents_that_write_nothing_perturb_nothing() -> None:
    rows, value_NF = planted_kinds(entangled=True)
    x_ND = torch.eye(D, dtype=torch.float64)[KINDS.group_N] * 4 + noise(N, D)
    found = perturb(material(KINDS, x_ND), codes(value_NF), KINDS, rows)
    assert [one.value for one in found.score] == [0, 0, 0]


CELLS = Task("pair left and right", ("both", "first", "second", "neither"), np.arange(N) // 2 % 4)
PAIR = Pair("left", "right", ())


@pytest.mark.parametrize("spurious", [0, 1])
def test_a_spurious_label_with_latents_of_its_own_is_removed(spurious: int) -> None:
    """The biased probe leans on the larger of two directions: one latent writes it, another its opposite elsewhere."""
    x_ND = noise(N, D, scale=1.0)
    rows, value_NF = torch.zeros(F, D, dtype=torch.float64), torch.zeros(N, F, dtype=torch.float64)
    for label, side in enumerate((("both", "first"), ("both", "second"))):
        has_N = torch.from_numpy(CELLS.of(*side))
        size = 8.0 if label == spurious else 3.0
        x_ND[:, label] += torch.where(has_N, size, -size)
        rows[2 * label, label], rows[2 * label + 1, label] = 1, -1
        value_NF[has_N, 2 * label] = value_NF[~has_N, 2 * label + 1] = size
    value_NF[:, 6:], rows[6:, 5] = 1, 1
    found = remove(material(CELLS, x_ND), codes(value_NF), [(PAIR, CELLS)], rows)
    (pair,) = found.pairs
    assert (pair.target, pair.spurious) == (("right", "left") if spurious == 0 else ("left", "right"))
    assert pair.clean.value is not None
    assert pair.biased.value is not None
    assert pair.clean.value > 0.98
    assert pair.biased.value < 0.7
    assert found.ablated[0] == 2
    assert found.score[0] == pair.score[0]
    assert pair.score[0].value == pytest.approx(1, abs=0.05)
    assert pair.score[0].interval is not None
    assert pair.score[0].interval[0] > 0.9
    assert (pair.random[0].value or 0) < 0.6


def test_removal_is_its_formula() -> None:
    """Against accuracies of decoded activations, cell by cell."""
    x_ND, rows = noise(N, D, seed=1, scale=1.0), noise(F, D, seed=3, scale=1.0)
    value_NF = noise(N, F, seed=2, scale=1.0).clamp_min(0)
    for label, side in enumerate((("both", "first"), ("both", "second"))):
        x_ND[:, label] += torch.from_numpy(CELLS.of(*side)) * 2.0
        value_NF[CELLS.of(*side), label] += 1
    of, sparse = material(CELLS, x_ND), codes(value_NF)
    found = remove(of, sparse, [(PAIR, CELLS)], rows)
    (pair,) = found.pairs
    target, spurious = (("both", "first"), ("both", "second"))[:: 1 if pair.target == "left" else -1]
    at = CELLS.rows(of.sample.is_test_N)

    def accuracy(probe: Probe, y_ND: torch.Tensor) -> float:
        right = (probe.logits(y_ND).numpy() > 0) == CELLS.of(*target)
        return float(np.mean([right[at][CELLS.of(group)[at]].mean() for group in CELLS.groups]))

    biased = of.probe(CELLS, "both", among=CELLS.of("both", "neither"))
    clean, before = accuracy(of.probe(CELLS, *target), x_ND), accuracy(biased, x_ND)
    assert (pair.clean.value, pair.biased.value) == pytest.approx((clean, before))
    fitted = CELLS.rows(~of.sample.is_test_N)
    has, a_NF = CELLS.of(*spurious)[fitted], value_NF.numpy()[fitted]
    effect_F = np.abs((a_NF[has].mean(0) - a_NF[~has].mean(0)) * (rows @ of.probe(CELLS, *spurious).weight_D).numpy())
    for place, count in enumerate(found.ablated):
        gone = torch.from_numpy(np.argsort(-effect_F)[:count].copy())
        after = accuracy(biased, x_ND - value_NF[:, gone] @ rows[gone])
        assert pair.score[place].value == pytest.approx((after - before) / (clean - before))


def test_random_latents_are_those_that_fire_and_the_same_for_a_seed() -> None:
    value_NF = torch.zeros(N, F)
    value_NF[:, 3:9] = 1
    drawn = list(at_random(codes(value_NF), np.arange(N), 2, seed=4))
    assert drawn == list(at_random(codes(value_NF), np.arange(N), 2, seed=4))
    assert {latent for one in drawn for latent in one} <= set(range(3, 9))
    assert all(len(set(one)) == 2 for one in drawn)
    assert len(set(map(tuple, itertools.chain(drawn, at_random(codes(value_NF), np.arange(N), 2, seed=5))))) > 2
    assert [len(one) for one in at_random(codes(value_NF), np.arange(N), 100, seed=4)] == [6] * 5
    assert chosen(np.array([0.0, 3.0, -1.0, 2.0]), 3) == [1, 3]


@pytest.mark.parametrize("kind", OF_TOKENS)
def test_every_kind_of_dictionary_is_scored(kind: str) -> None:
    """Against what is written; a dictionary whose latents write no row has the scores that need none."""
    dictionary = make(kind).dictionary
    x_ND = noise(N, dictionary.widths.d_in, scale=1.0).float()
    y_ND = x_ND if dictionary.config.is_autoencoder else noise(N, dictionary.widths.d_out, seed=1, scale=1.0).float()
    x_ND[YES] += 3
    task = Task("concept string", ("yes", "no"), np.where(YES, 0, 1))
    of = material(task, x_ND)
    of.y_ND = y_ND
    of.sample.tasks["kinds"] = KINDS
    found = score(dictionary, of, 100)
    assert found.probes is not None
    assert found.probes.activation.value == pytest.approx(1, abs=0.01)
    assert len(found.concepts[0].best) == 5
    if kind == "molt":
        assert found.perturbation is None
        assert found.left_out == dict.fromkeys(("absorption", "perturbation", "removal"), NO_ROWS)
    else:
        assert found.perturbation is not None
        assert found.left_out == {}
    assert SupervisedFigures.from_json(found.to_json()) == found
