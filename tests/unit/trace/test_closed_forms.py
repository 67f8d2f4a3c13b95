"""Graphs whose edges are known in closed form, and the faults that other tracers have had."""

import pytest
import torch

from shared.lm.frozen import run
from shared.lm.hookpoint import HookPoint
from shared.lm.linear_parts import linear_parts
from stage_trace.leaves import Columns
from stage_trace.sweep import sweep
from stage_trace.targets import Features, Logits, Targets, logit_targets
from tests.tracing import Traced, make_model, make_traced, of_dictionaries


def all_features(traced: Traced) -> Targets:
    features = Features.of(traced.replacement)
    return features[torch.arange(len(features))]


def rows_of(traced: Traced, *, logits: bool = False) -> torch.Tensor:
    last = Logits.choose(traced.recording.logits_V, 1.0, 3)
    count = len(traced.columns.outputs)
    targets = logit_targets(last, traced.parts, traced.recording, count) if logits else all_features(traced)
    return sweep(traced.parts, traced.recording, traced.replacement, traced.columns, targets).rows_BS


def without_attention(traced: Traced) -> Traced:
    """The same weights, attention and norms taken out: what an edge is, is a product of rows."""
    model = traced.model
    for layer in traced.parts.layers:
        layer.heads.output.weight.data.zero_()
    return of_dictionaries(model, traced.dictionaries)


def test_an_edge_of_two_layers_is_a_product_of_rows() -> None:
    """A[(l, i), (0, j)] = a_j (W_enc,i s w) . W_dec,j where there is no attention."""
    traced = without_attention(make_traced("llama"))
    rows = rows_of(traced)
    zero, one = (traced.replacement.stand_ins[layer].latents for layer in (0, 1))
    encoder_ND, decoder_ND = one.encoder(slice(None)), zero.decoder(HookPoint(0, "mlp_out"), slice(None))
    scale = traced.recording.scales[1, "mlp"]
    weight = traced.parts.layers[1].mlp_norm.weight_D.double()
    start = len(zero.value_N)
    for i in range(len(one.value_N)):
        for j in range(len(zero.value_N)):
            same = one.position_N[i] == zero.position_N[j]
            read = encoder_ND[i] * weight * scale[one.position_N[i]]
            expected = float(zero.value_N[j] * (read @ decoder_ND[j])) if same else 0.0
            assert float(rows[start + i, j]) == pytest.approx(expected, abs=1e-12)


def test_without_branches_a_logit_is_its_token_alone() -> None:
    """Attention and MLPs of zero: the last token's embedding explains all."""
    traced = make_traced("llama")
    for layer, block in zip(traced.parts.layers, traced.model.model.layers, strict=True):
        layer.heads.output.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    bare = of_dictionaries(traced.model, [])
    recording, replacement = bare.recording, bare.replacement
    columns = Columns.of(replacement)
    logits = Logits.choose(recording.logits_V, 1.0, 3)
    targets = logit_targets(logits, traced.parts, recording, len(columns.outputs))
    rows = sweep(traced.parts, recording, replacement, columns, targets).rows_BS
    torch.testing.assert_close(rows[:, columns.tokens][:, -1], targets.goal_B)
    assert float(rows[:, : columns.tokens.stop - 1].abs().max()) == 0
    assert columns.num_features == 0  # nothing fires anywhere


def test_f31_error_is_output_minus_everything() -> None:
    """Skip and biases are in the reconstruction, by the dictionary's own decode where it has no skip."""
    for skip in (False, True):
        traced = make_traced("llama", torch.float32, skip=skip)
        layer, made = traced.replacement.stand_ins[1], traced.dictionaries[1]
        sites = traced.recording.sites
        expected = sites[layer.output] - made(sites[layer.latents.read]).x_hat
        expected[0] = 0  # a fixed position has no error
        torch.testing.assert_close(layer.error_TD, expected, rtol=1e-4, atol=1e-4)


def test_values_are_the_dictionarys_own() -> None:
    for activation in ("topk", "gated", "jumprelu"):
        traced = make_traced("llama", torch.float32, activation=activation)
        latents, made = traced.replacement.stand_ins[1].latents, traced.dictionaries[1]
        dense = made.encode(traced.recording.sites[latents.read]).to_dense(made.config.d_latent)
        torch.testing.assert_close(latents.value_N, dense[latents.position_N, latents.latent_N], rtol=1e-4, atol=1e-4)
        dense[0] = 0
        assert len(latents.value_N) == int((dense != 0).sum())


def test_rows_read_no_later_position_and_no_later_layer() -> None:
    """Rows are targets; a source lies at or before its target, in an earlier layer."""
    traced = make_traced("qwen2")
    rows, targets = rows_of(traced), all_features(traced)
    early = targets.position_B[:, None] < targets.position_B[None, :]
    not_below = targets.output_B[:, None] <= targets.output_B[None, :]
    features = rows[:, : len(targets)]
    assert float(features[early | not_below].abs().max()) == 0
    assert float(features[~(early | not_below)].abs().min()) > 0


def test_f44_the_softcap_of_logits_is_outside_and_that_of_scores_inside() -> None:
    """Probabilities are capped, what a row explains is not; attention's cap is part of the pattern."""
    model = make_model("gemma2", torch.float32)
    model.config.final_logit_softcapping = 2.0
    parts = linear_parts(model)
    tokens_T = torch.randint(3, 50, (6,))
    with torch.no_grad():
        recording = run(model, parts, tokens_T)
        expected = model(tokens_T[None]).logits[0, -1]
    assert float(recording.logits_V.abs().max()) <= 2.0
    torch.testing.assert_close(recording.logits_V, expected, rtol=1e-4, atol=1e-5)
    targets = logit_targets(Logits.choose(recording.logits_V, 1.0, 2), parts, recording, len(parts.layers))
    assert float(targets.goal_B.abs().max()) > 2.0


def test_grouped_heads_are_heads_of_their_own() -> None:
    """GQA: what the value heads give, and what passes through each query head adds up over heads."""
    traced = make_traced("llama")
    targets = all_features(traced)
    swept = sweep(traced.parts, traced.recording, traced.replacement, traced.columns, targets)
    assert swept.heads_BLH is not None
    reads_1 = targets.output_B == 1
    # A target in layer 1 gets from attention what it does not get from the stream below layer 1 directly.
    assert float(swept.heads_BLH[reads_1][:, 2].abs().max()) == 0
    assert float(swept.heads_BLH[reads_1][:, 1].abs().max()) > 0
