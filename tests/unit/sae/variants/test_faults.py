"""Faults that transcoders of other projects have had, one test each; a kind's own stand beside its tests."""

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.sae.learn.init import initialise
from tests.variants import batch, make

KINDS = ["transcoder", "skip_transcoder", "clt"]


@pytest.mark.parametrize("kind", KINDS)
def test_f01_the_target_is_the_output_hook(kind: str) -> None:
    """Loss and FVU are of what is written: they follow it, and one that gives it exactly has none."""
    objective = make(kind, pre_bias=False)
    x_ND, y_ND = batch(objective, 100)
    initialise(objective, None, x_ND, None, y_ND)
    made = objective.dictionary
    with torch.no_grad():
        written_ND = made(x_ND).x_hat
    same = objective.losses(x_ND, written_ND)
    other = objective.losses(x_ND, written_ND + 3)
    if kind == "transcoder":  # batchtopk's threshold aside, training and inference choose alike
        assert float(same.metrics["fvu"]) < 1e-9
    assert float(other.metrics["fvu"]) > float(same.metrics["fvu"]) + 0.01
    assert float(other.reconstruction) == pytest.approx(float(other.metrics["fvu"]), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_f02_no_b_dec_on_the_input(kind: str) -> None:
    """sparsify 49, SAELens 516: it lies in the space that is written. What fires does not depend on it."""
    objective = make(kind)
    made = objective.dictionary.requires_grad_(False)
    x_ND, _ = batch(objective, 20)
    before = made.encode(x_ND)
    made.b_dec.add_(5.0)
    after = made.encode(x_ND)
    assert torch.equal(before.values, after.values)
    assert torch.equal(before.indices, after.indices)
    with pytest.raises(
        GranaryError, match=r"sae\.pre_bias=true subtracts b_dec, which lies in the space that is written"
    ):
        make(kind, pre_bias=True)


@pytest.mark.parametrize("kind", KINDS)
def test_f03_the_decoder_is_not_the_transpose_across_spaces(kind: str) -> None:
    """It starts as the mean of what is wanted where a latent fires, also where both widths are one."""
    objective = make(kind)
    x_ND, y_ND = batch(objective, 400)
    initialise(objective, None, x_ND, None, y_ND)
    made = objective.dictionary.requires_grad_(False)
    latents = made.encode(x_ND)
    wanted_ND = made.target(y_ND, made.normalise(x_ND)[0]) - made.b_dec
    f_NF = latents.to_dense(made.config.d_latent)
    first = 0
    for group, (reads, writes) in zip(made.groups, made.places, strict=True):
        own_NF = f_NF[:, first : first + group.num_latents]
        rows_FD = own_NF.T @ wanted_ND[:, writes]
        alive_F = own_NF.any(0)
        cosine_F = torch.cosine_similarity(rows_FD, group.W_dec, dim=1)[alive_F]
        assert alive_F.any()
        assert float(cosine_F.min()) > 0.99
        width = min(group.W_enc.shape[1], group.W_dec.shape[1])
        assert float(torch.cosine_similarity(group.W_enc[:, :width], group.W_dec[:, :width], dim=1).median()) < 0.9
        assert reads.stop is None or reads.stop > (reads.start or 0)
        first += group.num_latents


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip_transcoder", "crosscoder", "clt"])
def test_f10_a_batchtopk_row_alone_equals_in_batch(kind: str) -> None:
    """Inference is by the threshold: what a token gets does not depend on the others."""
    objective = make(kind, activation="batchtopk")
    x_ND, y_ND = batch(objective, 100)
    initialise(objective, None, x_ND, None, y_ND)
    whole = objective.dictionary.encode(x_ND).to_dense(objective.dictionary.config.d_latent)
    for row in (0, 17):
        alone = objective.dictionary.encode(x_ND[row : row + 1]).to_dense(objective.dictionary.config.d_latent)
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "given"), [("transcoder", {}), ("crosscoder", {"gate": "sum"}), ("clt", {})])
def test_f18_the_decoder_norm_has_a_gradient_in_penalties(kind: str, given: dict[str, str]) -> None:
    """Without one the decoder grows while f shrinks, and the penalty is escaped."""
    objective = make(
        kind, activation="relu", penalty="l1", penalty_weight=1.0, unit_norm_decoder=False, auxk_alpha=0.0,
        pre_bias=False, **given,
    )  # fmt: skip
    x_ND, y_ND = batch(objective, 50)
    losses = objective.losses(x_ND, y_ND)
    penalty_alone = float(losses.total.detach() - losses.reconstruction)
    group = objective.dictionary.groups[0]
    with torch.no_grad():
        objective.dictionary.target_variance.fill_(1e30)  # leaves the penalty alone in the loss
    loss = objective.losses(x_ND, y_ND).total
    assert float(loss.detach()) == pytest.approx(penalty_alone, rel=1e-3)
    loss.backward()
    assert group.W_dec.grad is not None
    along_F = (group.W_dec.grad * group.W_dec.detach()).sum(1)
    assert float(along_F.min()) >= -1e-6
    assert float(along_F.max()) > 1e-4
