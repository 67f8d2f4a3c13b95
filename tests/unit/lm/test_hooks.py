"""Every hook site of every family, against what the architecture says it is, and splicing."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedModel, Qwen3MoeConfig

from shared.basics.errors import GranaryError
from shared.lm import capture, check_hooks, decoder_blocks, needed_depth, splice
from shared.lm.hookpoint import SITES, HookPoint, hook_points
from tests.families import FAMILIES, HEADS

families = pytest.mark.parametrize("family", FAMILIES)


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose norms have random scales too, so that no norm passes for another."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(seed))


@families
def test_sites_are_what_the_architecture_computes(family: str) -> None:
    model, ids = build(family), tokens()
    with capture(model, hook_points("all", SITES, 3)) as got:
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for layer, block in enumerate(decoder_blocks(model)):
        pre, post, mlp_in, mlp_out, attn_out = (got[HookPoint(layer, site)] for site in SITES)
        assert torch.equal(pre, states[layer])
        if layer < 2:  # transformers gives the last one after the final norm
            assert torch.equal(post, states[layer + 1])
        torch.testing.assert_close(post, pre + attn_out + mlp_out)
        assert attn_out.norm() > 0.01 * pre.norm()
        middle = pre if family == "pythia" else pre + attn_out
        norm_before = "pre_feedforward_layernorm" if "gemma" in family else "post_attention_layernorm"
        torch.testing.assert_close(mlp_in, getattr(block, norm_before)(middle))
        norm_after = block.post_feedforward_layernorm if "gemma" in family else nn.Identity()
        torch.testing.assert_close(mlp_out, norm_after(block.mlp(mlp_in)))


@families
@pytest.mark.parametrize("site", SITES)
def test_the_same_in_place_changes_nothing(family: str, site: str) -> None:
    model, ids = build(family), tokens()
    clean = model(ids).logits
    seen = []
    with splice(model, HookPoint(1, site), lambda x: seen.append(x.shape) or x.clone()):
        assert torch.equal(model(ids).logits, clean)
    assert seen == [(2, 7, 16)]


@families
@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_another_prompts_residual_gives_its_logits(family: str, site: str) -> None:
    model, ids, others = build(family), tokens(0), tokens(1)
    hook = HookPoint(1, site)
    with capture(model, [hook]) as got:
        wanted = model(others).logits
    with splice(model, hook, lambda _: got[hook]):
        torch.testing.assert_close(model(ids).logits, wanted)
    assert not torch.equal(model(ids).logits, wanted)


@families
@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
def test_a_branch_replaced_by_zero_adds_nothing(family: str, site: str) -> None:
    model = build(family)
    other = HookPoint(1, "mlp_out" if site == "attn_out" else "attn_out")
    ends = [HookPoint(1, "resid_pre"), HookPoint(1, "resid_post"), other]
    with splice(model, HookPoint(1, site), torch.zeros_like), capture(model, ends) as got:
        model(tokens())
    pre, post, kept = (got[hook] for hook in ends)
    torch.testing.assert_close(post, pre + kept)


def test_mlp_in_replaced_reaches_the_mlp() -> None:
    model = build("llama")
    hook, out = HookPoint(0, "mlp_in"), HookPoint(0, "mlp_out")
    with splice(model, hook, torch.zeros_like), capture(model, [out]) as got:
        model(tokens())
    assert got[out].abs().max() == 0


def test_hooks_are_gone_after_an_exception() -> None:
    model, ids = build("llama"), tokens()
    clean = model(ids).logits

    def stop(_: Tensor) -> Tensor:
        raise KeyError("stop")

    for site in SITES:
        with (
            pytest.raises(KeyError, match="stop"),
            capture(model, [HookPoint(1, site)]),
            splice(model, HookPoint(1, site), stop),
        ):
            model(ids)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(ids).logits, clean)


def test_a_replacement_of_another_shape_is_refused() -> None:
    model = build("llama")
    with (
        pytest.raises(ValueError, match=r"\(1, 7, 16\) in place of \(2, 7, 16\)"),
        splice(model, HookPoint(0, "resid_post"), lambda x: x[:1]),
    ):
        model(tokens())


@pytest.mark.parametrize(
    ("hooks", "depth"),
    [
        (["layers.2.resid_post"], (3, True)),
        (["layers.2.resid_pre"], (2, True)),
        (["layers.0.resid_pre"], (1, False)),
        (["layers.2.attn_out"], (3, False)),
        (["layers.2.mlp_in"], (3, True)),
        (["layers.3.resid_pre", "layers.2.attn_out"], (3, True)),
        (["layers.0.mlp_out", "layers.2.attn_out"], (3, False)),
    ],
)
def test_no_more_layers_than_the_hooks_need(hooks: list[str], depth: tuple[int, bool]) -> None:
    assert needed_depth([HookPoint.parse(hook) for hook in hooks]) == depth


def test_wrong_hooks_are_named() -> None:
    with pytest.raises(GranaryError, match=r"layers\.3\.resid_post is not in the model: it has 3 layers, 0 to 2"):
        check_hooks(FAMILIES["llama"](), [HookPoint(3, "resid_post")])
    moe = Qwen3MoeConfig(**HEADS, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1)
    check_hooks(moe, [HookPoint(1, "resid_post")])
    with pytest.raises(GranaryError, match=r"attention and MLP hooks are known for llama.*not for qwen3_moe"):
        check_hooks(moe, [HookPoint(1, "mlp_out")])
    with pytest.raises(GranaryError, match="BloomModel has no list of decoder layers"):
        check_hooks(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2), [HookPoint(0, "resid_post")])
