"""Thresholds in the place of k: against a dense count of what fires."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.sae.__main__ import main
from shared.sae.calibrate import Threshold, Tokens, one_each, one_for_all, with_thresholds
from shared.sae.loading import load
from shared.sae.sites import Sites
from shared.sae.variants import Dictionary
from shared.store import Store
from tests.circuits import LAYERS, PROVENANCE, READS, WRITES, D, assert_same, of_clt, of_set, started
from tests.synthetic import synthetic_plan, synthetic_tokens

BETWEEN = Sites(READS[:1], WRITES[:1])
ALL = Sites(READS, WRITES)
SEQ_LEN = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Tokens of the distribution that ``tests.circuits`` starts dictionaries on, for what is read and written."""
    hooks = dict.fromkeys((*READS, *WRITES), D)
    plan = synthetic_plan(8, SEQ_LEN, hooks=hooks, dtype="float32", shard_contexts=4, heldout_fraction=0.5)
    made = Store.create(str(tmp_path_factory.mktemp("store")), plan, *synthetic_tokens(plan))
    generator = torch.Generator().manual_seed(4)
    for shard in made.pending():
        shape = (len(made.shard_contexts(shard)), SEQ_LEN, D)
        made.write_shard(shard, {hook: 3 * torch.randn(shape, generator=generator) + 1 for hook in hooks})
    made.finalize()
    return made


def positive(made: Dictionary, tokens: Tokens) -> torch.Tensor:
    """relu(z) of every latent, group after group, [N, F], in plain products."""
    with torch.no_grad():
        return torch.cat(
            [
                torch.cat(
                    [
                        torch.relu(made.normalise(x_ND)[0][:, reads] @ group.W_enc.T + group.b_enc)
                        for group, (reads, _) in zip(made.groups, made.places, strict=True)
                    ],
                    1,
                )
                for x_ND, _ in tokens
            ]
        )


def fired(made: Dictionary, tokens: Tokens) -> torch.Tensor:
    """Whether each latent fires, [N, F]."""
    return torch.cat([made.encode(x_ND).to_dense(made.config.d_latent) > 0 for x_ND, _ in tokens])


KINDS: list[tuple[str, Sites, dict[str, Any]]] = [
    ("transcoder", BETWEEN, {"activation": "topk"}),
    ("skip_transcoder", BETWEEN, {"activation": "batchtopk"}),
    ("crosscoder", Sites.of(*READS[:2]), {"activation": "topk", "pre_bias": False}),
    ("clt", ALL, {"activation": "topk"}),
]


@pytest.mark.parametrize(("kind", "sites", "given"), KINDS, ids=[kind for kind, _, _ in KINDS])
def test_one_threshold_gives_the_l0_that_is_asked_for(
    store: Store, kind: str, sites: Sites, given: dict[str, Any]
) -> None:
    made, _ = started(kind, sites, **given)
    tokens = Tokens(store, sites, store.contexts("heldout").tolist())
    positive_NF = positive(made, tokens)
    for l0 in (2.5, 4.0):
        thresholds = one_for_all(made, tokens, l0)
        wanted = round(l0 * tokens.count)
        ordered_P = positive_NF.flatten().sort(descending=True).values
        assert float(ordered_P[wanted]) < float(thresholds[0][0]) < float(ordered_P[wanted - 1])
        assert int(fired(with_thresholds(made, thresholds), tokens).sum()) == wanted
    with pytest.raises(GranaryError, match=r"an L0 of 1000 can't be had: [\d.]+ latents per token are positive"):
        one_for_all(made, tokens, 1000)


def test_under_the_gate_sum_the_largest_are_weighted_by_norms(store: Store) -> None:
    sites = Sites.of(*READS[:2])
    made, _ = started("crosscoder", sites, activation="batchtopk", gate="sum", pre_bias=False)
    tokens = Tokens(store, sites, store.contexts("heldout").tolist())
    norm_F = made.W_dec.split(D, dim=1)[0].norm(dim=1) + made.W_dec.split(D, dim=1)[1].norm(dim=1)
    weighted_NF = positive(made, tokens) * norm_F
    wanted = 4 * tokens.count
    least = weighted_NF.flatten().topk(wanted).values[-1]
    now_NF = fired(with_thresholds(made, one_for_all(made, tokens, 4)), tokens)
    assert torch.equal(now_NF, weighted_NF >= least)


@pytest.mark.parametrize(("kind", "sites"), [("transcoder", BETWEEN), ("clt", ALL)])
def test_each_latents_own_threshold_keeps_how_often_it_fires(store: Store, kind: str, sites: Sites) -> None:
    made, _ = started(kind, sites, activation="topk")
    tokens = Tokens(store, sites, store.contexts("heldout").tolist())
    before_NF, after_NF = fired(made, tokens), fired(with_thresholds(made, one_each(made, tokens, 4)), tokens)
    assert torch.equal(before_NF.sum(0), after_NF.sum(0))
    assert float(after_NF.sum() / tokens.count) == pytest.approx(4)
    assert (before_NF != after_NF).any()
    fewer_NF = fired(with_thresholds(made, one_each(made, tokens, 2)), tokens)
    assert int(fewer_NF.sum()) == 2 * tokens.count


def test_f50_the_command_says_the_l0_it_gives(tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    made, x_ND = started("transcoder", BETWEEN, activation="topk")
    made.save_pretrained(tmp_path / "ours", PROVENANCE)
    convert = ["convert", str(tmp_path / "ours")]
    main([*convert, str(tmp_path / "new"), "--to", "granary", "--threshold", store.url, "--l0", "3"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "held-out tokens; on others L0 " in shown
    assert "by topk L0 4.00 and FVU" in shown
    calibrated = load(tmp_path / "new")
    assert (calibrated.config.activation, calibrated.config.k) == ("jumprelu", None)
    fires_N = (calibrated.encode(x_ND).indices >= 0).sum(1)
    assert 1 < float(fires_N.float().mean()) < 8
    wrong = {
        ("--l0", "3"): "--l0, --per-latent and --contexts are for --threshold STORE",
        ("--threshold", store.url, "--l0", "0.5", "--per-latent"): "--l0 0.5: for thresholds of each latent's own",
        ("--threshold", store.url, "--contexts", "0"): "contexts=0: at least one",
    }
    for more, told in wrong.items():
        with pytest.raises(SystemExit) as stop:
            main([*convert, str(tmp_path / "other"), "--to", "granary", *more])
        assert stop.value.code == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
    started("transcoder", BETWEEN, activation="relu")[0].save_pretrained(tmp_path / "relu", PROVENANCE)
    with pytest.raises(GranaryError, match="has relu, whose latents need no k"):
        Threshold(store.url).apply("it", load(tmp_path / "relu"), {})


def test_topk_reaches_circuit_tracer_by_a_threshold(tmp_path: Path, store: Store) -> None:
    more = ["--to", "circuit_tracer", "--threshold", store.url]
    for layer in range(LAYERS):
        sites = Sites(READS[layer : layer + 1], WRITES[layer : layer + 1])
        made, x_ND = started("transcoder", sites, activation="topk", seed=layer)
        made.save_pretrained(tmp_path / "set" / f"layer_{layer}", PROVENANCE)
    main(["convert", str(tmp_path / "set"), str(tmp_path / "theirs"), *more])
    main(["convert", str(tmp_path / "set" / "layer_2"), str(tmp_path / "own"), "--to", "granary", *more[2:]])
    assert_same(load(tmp_path / "own"), x_ND, *of_set(tmp_path / "theirs", 2, x_ND))
    clt, x_ND = started("clt", ALL, activation="topk")
    clt.save_pretrained(tmp_path / "clt", PROVENANCE)
    main(["convert", str(tmp_path / "clt"), str(tmp_path / "clt_theirs"), *more])
    main(["convert", str(tmp_path / "clt"), str(tmp_path / "clt_own"), "--to", "granary", *more[2:]])
    assert_same(load(tmp_path / "clt_own"), x_ND, *of_clt(tmp_path / "clt_theirs", x_ND))
