"""Splices from several sites to others: what the model itself computes changes nothing, and what can't work is told."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from shared.basics.errors import GranaryError
from shared.lm import capture, splice, splice_through
from shared.lm.hookpoint import HookPoint
from tests.cached import checkpoint_layers
from tests.splicing import D, prompt, tiny_llama

MLP_IN, MLP_OUT = HookPoint(1, "mlp_in"), HookPoint(1, "mlp_out")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


def mlp(model: LlamaForCausalLM, layer: int) -> nn.Module:
    return model.model.layers[layer].mlp


@torch.no_grad()
def test_the_true_mlp_in_its_own_place_gives_equal_logits(model: LlamaForCausalLM) -> None:
    clean = model(prompt()).logits
    calls = []

    def true_mlp(x_BTD: Tensor) -> Tensor:
        calls.append(x_BTD.shape)
        return mlp(model, 1).forward(x_BTD)  # not by a call, which would come here again

    with splice_through(model, [MLP_IN], [MLP_OUT], true_mlp):
        assert torch.equal(model(prompt()).logits, clean)
    assert calls == [(2, 7, D)]


@torch.no_grad()
def test_zero_ablation_is_a_branch_that_adds_nothing(model: LlamaForCausalLM) -> None:
    down = mlp(model, 1).down_proj.weight
    with splice_through(model, [MLP_IN], [MLP_OUT], torch.zeros_like):
        found = model(prompt()).logits
    kept = down.clone()
    down.zero_()
    expected = model(prompt()).logits
    down.copy_(kept)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_several_sites_are_read_and_written_side_by_side(model: LlamaForCausalLM) -> None:
    """Two MLP outputs written from the two inputs of layer 1: attention's result and the stream."""
    reads = [HookPoint(0, "mlp_in"), HookPoint(0, "resid_post")]
    writes = [HookPoint(2, "mlp_out"), HookPoint(1, "mlp_out")]  # in another order than the model computes them
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * D, 2 * D, generator=generator)
    with capture(model, reads) as seen:
        model(prompt())
    expected = torch.cat([seen[hook] for hook in reads], dim=-1) @ weight
    calls = []

    def mix(x: Tensor) -> Tensor:
        calls.append(x)
        return x @ weight

    with splice_through(model, reads, writes, mix, widths=[D, D]), capture(model, writes) as written:
        spliced = model(prompt()).logits
    assert len(calls) == 1
    assert torch.equal(written[writes[0]], expected[..., :D])
    assert torch.equal(written[writes[1]], expected[..., D:])
    with (
        splice(model, writes[0], lambda _: expected[..., :D]),
        splice(model, writes[1], lambda _: expected[..., D:]),
    ):
        assert torch.equal(model(prompt()).logits, spliced)


@torch.no_grad()
def test_positions_left_alone_keep_what_the_site_holds(model: LlamaForCausalLM) -> None:
    where = torch.zeros(2, 7, dtype=torch.bool)
    where[0, 3:5] = True
    with capture(model, [MLP_OUT]) as clean:
        model(prompt())
    with splice_through(model, [MLP_IN], [MLP_OUT], torch.zeros_like, where=where), capture(model, [MLP_OUT]) as got:
        model(prompt())
    assert torch.equal(got[MLP_OUT], torch.where(where[..., None], 0, clean[MLP_OUT]))


@torch.no_grad()
def test_a_splice_reads_what_another_one_writes(model: LlamaForCausalLM) -> None:
    """Two layers replaced at once: the second is given the stream that the first one changed."""
    seen = []
    with (
        splice(model, HookPoint(0, "mlp_out"), torch.zeros_like),
        splice_through(model, [MLP_IN], [MLP_OUT], lambda x: seen.append(x) or torch.zeros_like(x)),
    ):
        model(prompt())
    with splice(model, HookPoint(0, "mlp_out"), torch.zeros_like), capture(model, [MLP_IN]) as expected:
        model(prompt())
    assert torch.equal(seen[0], expected[MLP_IN])


def test_the_middle_of_a_layer_can_be_written(model: LlamaForCausalLM) -> None:
    middle = HookPoint(1, "resid_mid")
    with (
        torch.no_grad(),
        splice_through(model, [HookPoint(1, "attn_out")], [middle], lambda x: 0 * x),
        capture(model, [MLP_OUT, HookPoint(1, "resid_post")]) as got,
    ):
        model(prompt())
    assert torch.equal(got[HookPoint(1, "resid_post")], got[MLP_OUT])


@pytest.mark.parametrize(
    ("reads", "writes", "message"),
    [
        (["layers.1.mlp_out"], ["layers.1.mlp_in"], r"layers\.1\.mlp_out is computed after layers\.1\.mlp_in"),
        (["layers.2.mlp_in"], ["layers.0.mlp_out"], r"layers\.2\.mlp_in is computed after layers\.0\.mlp_out"),
        (["layers.0.resid_post", "layers.1.resid_post"],) * 2 + (r"layers\.1\.resid_post is computed after",),
    ],
)
def test_a_site_read_too_late_is_told(
    model: LlamaForCausalLM, reads: list[str], writes: list[str], message: str
) -> None:
    places = (list(map(HookPoint.parse, names)) for names in (reads, writes))
    with (
        torch.no_grad(),
        pytest.raises(GranaryError, match=message),
        splice_through(model, *places, lambda x: x[..., : D * len(writes)]),
    ):
        model(prompt())


def test_results_of_another_width_are_refused(model: LlamaForCausalLM) -> None:
    both = [MLP_OUT, HookPoint(2, "mlp_out")]
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="33 columns"),
        splice_through(model, [MLP_IN], both, lambda x: x.new_zeros(2, 7, 2 * D + 1), widths=[D, D]),
    ):
        model(prompt())
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"\(2, 7, 15\) in place of \(2, 7, 16\)"),
        splice_through(model, [MLP_IN], [MLP_OUT], lambda x: x[..., 1:]),
    ):
        model(prompt())


class Fused(nn.Module):
    """The arithmetic of an MLP without its own call, as fused kernels do it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.down_proj(self.module.act_fn(self.module.gate_proj(x)) * self.module.up_proj(x))


def test_a_module_that_is_passed_by_is_told() -> None:
    model = tiny_llama()
    layer = model.model.layers[1]
    with torch.no_grad(), splice(model, MLP_OUT, torch.zeros_like):
        layer.mlp = Fused(layer.mlp)
        with pytest.raises(GranaryError, match=r"layers\.1\.mlp_out did not run in a forward"):
            model(prompt())


def test_a_module_that_two_layers_share_is_told() -> None:
    model = tiny_llama()
    model.model.layers[2] = model.model.layers[1]
    with (
        torch.no_grad(),
        splice(model, MLP_OUT, torch.zeros_like),
        pytest.raises(GranaryError, match=r"layers\.1\.mlp_out ran 2 times in a forward"),
    ):
        model(prompt(), use_cache=False)


@pytest.mark.parametrize("how", ["compile()", pytest.param("forward = torch.compile(forward)", marks=pytest.mark.slow)])
def test_a_model_compiled_before_is_spliced_all_the_same(how: str) -> None:
    model = tiny_llama()
    with torch.no_grad():
        clean = model(prompt()).logits
        with splice(model, MLP_OUT, torch.zeros_like):
            expected = model(prompt()).logits
        if how == "compile()":
            model.compile(backend="eager")
        else:
            model.forward = torch.compile(model.forward, backend="eager")
        model(prompt())
        with splice(model, MLP_OUT, torch.zeros_like):
            assert torch.equal(model(prompt()).logits, expected)
        assert torch.equal(model(prompt()).logits, clean)
    torch._dynamo.reset()


def test_gradients_flow_through_checkpointed_layers() -> None:
    """A checkpointed layer runs again in the backward pass, where its splice must do what it did."""
    weight = torch.randn(D, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        model = tiny_llama().train()
        model.requires_grad_(True)
        if checkpointed:
            checkpoint_layers(model, reentrant=False)
        with splice_through(model, [HookPoint(0, "mlp_in")], [MLP_OUT], lambda x: x @ weight):
            loss = model(prompt(), labels=prompt(), use_cache=False).loss
            gradients.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_every_mlp_replaced_by_itself_in_one_splice(model: LlamaForCausalLM) -> None:
    """What is written at a layer is made from the reads that are there: later ones are zeros until they are."""
    layers = range(3)
    reads, writes = ([HookPoint(layer, site) for layer in layers] for site in ("mlp_in", "mlp_out"))

    def true_mlps(x_BTD: Tensor) -> Tensor:
        parts = x_BTD.split(D, dim=-1)
        return torch.cat([mlp(model, layer).forward(part) for layer, part in zip(layers, parts, strict=True)], dim=-1)

    clean = model(prompt()).logits
    with splice_through(model, reads, writes, true_mlps, read_widths=[D] * 3):
        assert torch.equal(model(prompt()).logits, clean)
    with splice_through(model, reads, writes, torch.zeros_like, adds=True, read_widths=[D] * 3):
        assert torch.equal(model(prompt()).logits, clean)
    with (
        pytest.raises(GranaryError, match=r"layers\.1\.mlp_in is computed after layers\.0\.mlp_out"),
        splice_through(model, reads, writes, true_mlps),
    ):
        model(prompt())
