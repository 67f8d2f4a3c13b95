"""Every row of a graph adds up to what it explains, and two engines that share no code agree on every entry."""

import pytest
import torch

from shared.lm.frozen import run
from shared.lm.hookpoint import HookPoint
from shared.lm.linear_parts import linear_parts
from stage_trace.autograd import by_autograd
from stage_trace.sweep import sweep
from stage_trace.targets import Features, Logits, Targets, logit_targets
from tests.tracing import (
    TRACED,
    K,
    Traced,
    make_clt,
    make_lorsa,
    make_model,
    make_traced,
    make_transcoder,
    of_dictionaries,
)


def all_targets(traced: Traced, every: int = 1) -> Targets:
    """Some of the features and three logits."""
    logits = Logits.choose(traced.recording.logits_V, 1.0, 3)
    features = Features.of(traced.replacement)
    last = logit_targets(logits, traced.parts, traced.recording, len(traced.columns.outputs))
    some = features[torch.arange(0, len(features), every)]
    return Targets.joined([some, last])


def gap(rows_BS: torch.Tensor, goal_B: torch.Tensor) -> float:
    """Worst relative to the larger of the goal and the row's largest entry."""
    scale_B = torch.maximum(goal_B.abs(), rows_BS.abs().max(1).values)
    return float(((rows_BS.sum(1) - goal_B).abs() / scale_B).max())


CASES = [(family, "mlp_in", False) for family in TRACED] + [
    ("llama", "mlp_in", True),
    ("llama", "resid_mid", True),
    ("pythia", "mlp_in", True),
    pytest.param("pythia", "resid_pre", False, marks=pytest.mark.slow),
    pytest.param("neox_serial", "resid_mid", False, marks=pytest.mark.slow),
    pytest.param("llama", "resid_pre", True, marks=pytest.mark.slow),
    pytest.param("gemma2", "resid_mid", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "read", "skip"), CASES)
def test_f29_rows_add_up_and_engines_agree(family: str, read: str, skip: bool) -> None:
    traced = make_traced(family, read=read, skip=skip)
    targets = all_targets(traced)
    args = (traced.recording, traced.replacement, traced.columns, targets)
    swept = sweep(traced.parts, *args)
    assert gap(swept.rows_BS, targets.goal_B) <= 1e-10

    few = all_targets(traced, every=9)
    by_tape = by_autograd(traced.model, traced.parts, traced.tokens_T, *args[:3], few)
    by_sweep = sweep(traced.parts, *args[:3], few)
    torch.testing.assert_close(by_sweep.rows_BS, by_tape.rows_BS, rtol=1e-9, atol=1e-11)
    assert gap(by_tape.rows_BS, few.goal_B) <= 1e-10


@pytest.mark.parametrize("activation", ["relu", "batchtopk", "jumprelu", "gated"])
def test_f29_rows_add_up_for_every_activation(activation: str) -> None:
    traced = make_traced("llama", activation=activation)
    assert traced.replacement.num_latents > 10
    targets = all_targets(traced)
    swept = sweep(traced.parts, traced.recording, traced.replacement, traced.columns, targets)
    assert gap(swept.rows_BS, targets.goal_B) <= 1e-10


@pytest.mark.parametrize("tying", ["none", "per_source", "per_target"])
def test_f29_rows_of_a_clt_add_up_and_engines_agree(tying: str) -> None:
    """Latents write later MLPs too; its errors are what the dictionary's own reconstruction leaves."""
    traced = of_dictionaries(make_model("llama"), [make_clt(3, tying=tying)])
    assert traced.replacement.num_latents > 10
    targets = all_targets(traced)
    args = (traced.recording, traced.replacement, traced.columns, targets)
    swept, by_tape = sweep(traced.parts, *args), by_autograd(traced.model, traced.parts, traced.tokens_T, *args)
    assert gap(swept.rows_BS, targets.goal_B) <= 1e-10
    torch.testing.assert_close(swept.rows_BS, by_tape.rows_BS, rtol=1e-9, atol=1e-11)
    (clt,), layers = traced.dictionaries, range(3)
    x = torch.cat([traced.recording.sites[one.latents.read] for one in traced.replacement.stand_ins], 1)
    left = torch.cat([traced.recording.sites[HookPoint(layer, "mlp_out")] for layer in layers], 1) - clt(x).x_hat
    errors = torch.cat([one.error_TD for one in traced.replacement.stand_ins], 1)
    torch.testing.assert_close(errors[1:], left[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "read", "attended"),
    [
        ("llama", "mlp_in", (0, 1, 2)),
        ("gemma2", "mlp_in", (1,)),
        ("pythia", "mlp_in", (0, 1)),
        ("neox_serial", "resid_pre", (1, 2)),
        ("llama", "clt", (0, 2)),
    ],
)
def test_f29_rows_add_up_and_engines_agree_where_a_lorsa_stands_in_for_attention(
    family: str, read: str, attended: tuple[int, ...]
) -> None:
    """In every position of the block, beside layers whose attention stays; its errors are what it leaves."""
    model, lorsas = make_model(family), [make_lorsa(layer) for layer in attended]
    mlps = [make_clt(3)] if read == "clt" else [make_transcoder(layer, read=read, skip=True) for layer in range(3)]
    traced = of_dictionaries(model, [*mlps, *lorsas])
    targets = all_targets(traced)
    args = (traced.recording, traced.replacement, traced.columns, targets)
    swept, by_tape = sweep(traced.parts, *args), by_autograd(traced.model, traced.parts, traced.tokens_T, *args)
    assert gap(swept.rows_BS, targets.goal_B) <= 1e-10
    assert gap(by_tape.rows_BS, targets.goal_B) <= 1e-10
    torch.testing.assert_close(swept.rows_BS, by_tape.rows_BS, rtol=1e-9, atol=1e-11)
    output_N = Features.of(traced.replacement).output_N
    is_later = output_N[None] >= output_N[:, None]
    assert float(swept.rows_BS[: len(output_N), : len(output_N)][is_later].abs().max()) == 0
    stand_ins = {one.output: one for one in traced.replacement.stand_ins}
    for layer, lorsa in zip(attended, lorsas, strict=True):
        one = stand_ins[HookPoint(layer, "attn_out")]
        read_TD = traced.recording.sites[HookPoint(layer, "attn_in")]
        left_TD = traced.recording.sites[one.output] - lorsa(read_TD[None]).x_hat[0]
        torch.testing.assert_close(one.error_TD[1:], left_TD[1:], rtol=1e-4, atol=1e-4)
        assert float(one.error_TD[0].abs().max()) == 0  # a fixed position is one leaf
        assert len(one.latents.value_N) == (len(traced.tokens_T) - 1) * K


FORMS: list[dict[str, object]] = [{"softcap": 3.0, "window": 3}, {"norm_eps": 1e-5, "rope_scale": 1.1}]


@pytest.mark.parametrize("activation", ["topk", "relu", "batchtopk", "jumprelu", "gated"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_lorsas_latents_are_its_own(activation: str, form: dict[str, object]) -> None:
    """Which fire, and how strongly, of every activation and form of attention; their values add up."""
    lorsa = make_lorsa(1, activation=activation, **form)
    traced = of_dictionaries(make_model("llama"), [lorsa])
    latents = traced.replacement.stand_ins[1].latents
    dense = lorsa.encode(traced.recording.sites[latents.read][None]).to_dense(lorsa.config.d_latent)[0]
    dense[0] = 0
    assert len(latents.value_N) == int((dense != 0).sum()) > 5
    assert len(latents.value_N) < 0.9 * dense[1:].numel()
    found = dense[latents.position_N, latents.latent_N].double()
    torch.testing.assert_close(latents.value_N, found, rtol=1e-4, atol=1e-4)
    targets = all_targets(traced)
    swept = sweep(traced.parts, traced.recording, traced.replacement, traced.columns, targets)
    assert gap(swept.rows_BS, targets.goal_B) <= 1e-10


@pytest.mark.parametrize("family", ["llama", "gemma3", "pythia"])
def test_f29_rows_add_up_in_float32(family: str) -> None:
    traced = make_traced(family, torch.float32)
    targets = all_targets(traced)
    swept = sweep(traced.parts, traced.recording, traced.replacement, traced.columns, targets)
    assert gap(swept.rows_BS, targets.goal_B) <= 1e-4


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "pythia"])
def test_f43_replaced_model_leaves_no_hook(family: str) -> None:
    """What the traced model says is what the model says, and the model is afterwards what it was."""
    model = make_model(family, torch.float32)
    tokens_T = torch.randint(3, 50, (9,))
    with torch.no_grad():
        before = model(tokens_T[None]).logits[0, -1]
        recording = run(model, linear_parts(model), tokens_T)
        after = model(tokens_T[None]).logits[0, -1]
    assert torch.equal(before, after)
    torch.testing.assert_close(recording.logits_V, before, rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config._attn_implementation == "eager"
