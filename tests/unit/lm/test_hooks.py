"""Every hook site of every family, against what the architecture says it is, and splicing."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPT2Model,
    MambaConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from shared.basics.errors import GranaryError
from shared.lm import capture, check_hooks, decoder_blocks, needed_depth, splice
from shared.lm.hookpoint import SITES, HookPoint, hook_points
from tests.families import FAMILIES as MAIN_FAMILIES
from tests.families import HEADS, MORE_FAMILIES, PARALLEL, sites_of

FAMILIES = {**MAIN_FAMILIES, **MORE_FAMILIES}

families = pytest.mark.parametrize("family", FAMILIES)
SANDWICH = ("gemma2", "gemma3")
# The norms before attention and before the MLP.
NORMS = dict.fromkeys(FAMILIES, ("input_layernorm", "post_attention_layernorm")) | {
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
    "gemma3": ("input_layernorm", "pre_feedforward_layernorm"),
    "gpt2": ("ln_1", "ln_2"),
    "phi": ("input_layernorm", "input_layernorm"),
}


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose norms have random scales too, so that no norm passes for another."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if ("norm" in name or "ln_" in name) and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(seed))


@families
def test_sites_are_what_the_architecture_computes(family: str) -> None:
    model, ids = build(family), tokens()
    sites = sites_of(family)
    with capture(model, hook_points("all", sites, 3)) as got:
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for layer, block in enumerate(decoder_blocks(model)):
        at = {site: got[HookPoint(layer, site)] for site in sites}
        pre, post = at["resid_pre"], at["resid_post"]
        assert torch.equal(pre, states[layer])
        if layer < 2:  # transformers gives the last one after the final norm
            assert torch.equal(post, states[layer + 1])
        middle = pre
        if "resid_mid" in sites:
            middle = at["resid_mid"]
            torch.testing.assert_close(middle, pre + at["attn_out"])
        torch.testing.assert_close(post, pre + at["attn_out"] + at["mlp_out"])
        assert at["attn_out"].norm() > 0.01 * pre.norm()
        attn_norm, mlp_norm = (getattr(block, name) for name in NORMS[family])
        torch.testing.assert_close(at["attn_in"], attn_norm(pre))
        torch.testing.assert_close(at["mlp_in"], mlp_norm(middle))
        norm_after = block.post_feedforward_layernorm if family in SANDWICH else nn.Identity()
        torch.testing.assert_close(at["mlp_out"], norm_after(block.mlp(at["mlp_in"])))


@families
def test_attn_in_is_what_attention_reads(family: str) -> None:
    """In its place another prompt's input gives that prompt's attention."""
    model = build(family)
    hooks = [HookPoint(1, "attn_in"), HookPoint(1, "attn_out")]
    with capture(model, hooks) as got:
        model(tokens(1))
        wanted = dict(got)
    with splice(model, hooks[0], lambda _: wanted[hooks[0]]), capture(model, hooks[1:]) as got:
        model(tokens(0))
    torch.testing.assert_close(got[hooks[1]], wanted[hooks[1]])


@pytest.mark.parametrize("family", PARALLEL)
def test_a_parallel_block_has_no_middle(family: str) -> None:
    with pytest.raises(GranaryError, match=r"layers\.1\.resid_mid: attention and MLP of \w+ work side by side"):
        check_hooks(FAMILIES[family](), [HookPoint(1, "resid_mid")])


@pytest.mark.parametrize(
    ("family", "site"),
    [(family, site) for family in FAMILIES for site in sites_of(family) if site.startswith("resid")],
)
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


def test_a_middle_replaced_by_zero_leaves_what_the_mlp_adds() -> None:
    model = build("gemma2")
    seen = [HookPoint(1, site) for site in ("resid_mid", "mlp_out", "resid_post")]
    with capture(model, seen[2:]) as after, splice(model, seen[0], torch.zeros_like), capture(model, seen[:2]) as got:
        model(tokens())
    assert got[seen[0]].abs().max() == 0
    assert torch.equal(after[seen[2]], got[seen[1]])


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
        (["layers.2.attn_in"], (3, False)),
        (["layers.2.resid_mid"], (3, False)),
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


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2),
        OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2),
        PhiConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2),
        BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2),
        MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2),
    ],
    ids=lambda config: config.model_type,
)
def test_layers_are_found_by_whatever_name(config: PretrainedConfig) -> None:
    check_hooks(config, hook_points("all", ["resid_pre", "resid_post"], 2))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with capture(model, hook_points("all", ["resid_pre", "resid_post"], 2)) as got, torch.no_grad():
        states = model(tokens(), output_hidden_states=True, use_cache=False).hidden_states
    assert torch.equal(got[HookPoint(0, "resid_post")], got[HookPoint(1, "resid_pre")])
    assert any(torch.equal(got[HookPoint(1, "resid_pre")], state) for state in states)


def test_a_model_without_layers_is_told_what_was_looked_for() -> None:
    model = GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    del model.h
    with pytest.raises(GranaryError, match=r"GPT2Model has no list of decoder layers.*one list of 2 modules"):
        decoder_blocks(model)
