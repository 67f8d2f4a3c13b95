"""SAEs spliced into a LLaMA: edits, positions, generation, and a model that is unchanged afterwards."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from shared.basics.errors import GranaryError
from shared.intervene.edits import Edit, apply_edits, apply_edits_by_eviction
from shared.intervene.splice import SplicedModel
from shared.sae import SAE, SAEConfig, SparseLatents
from tests.cached import cache_in, continuing
from tests.splicing import HOOK, D, F, K, activation, prompt, tiny_llama


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module", params=["none", "layer_norm"])
def sae(request: pytest.FixtureRequest) -> SAE:
    config = SAEConfig(d_model=D, d_latent=F, k=K, normalisation=request.param)
    sae = SAE(config, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    sae.b_dec.copy_(torch.randn(D, generator=torch.Generator().manual_seed(1)) * 0.1)
    return sae


def edited_dense(sae: SAE, x: Tensor, edits: Sequence[Edit]) -> Tensor:
    """The reconstruction with the dense latent vector edited, by the definition."""
    latents = sae.encode(x)
    dense = latents.to_dense(F)
    for edit in edits:
        for latent, value in zip(edit.latents, edit.values(), strict=True):
            match edit.mode:
                case "set":
                    dense[..., latent] = value
                case "add":
                    dense[..., latent] += value
                case "multiply":
                    dense[..., latent] *= value
    return sae.denormalise(dense @ sae.W_dec + sae.b_dec, latents.token_mean, latents.token_scale)


EDITS = [Edit([3, 8, 21], "set", [2.0, 0.0, -1.0]), Edit([5, 30], "add", 1.5), Edit([0, 1, 2, 4, 6], "multiply", -2.0)]


@pytest.mark.parametrize("keep_error", [True, False])
def test_edits_equal_editing_the_dense_vector(model: LlamaForCausalLM, sae: SAE, keep_error: bool) -> None:
    tokens = prompt()
    x = activation(model, input_ids=tokens)
    expected = edited_dense(sae, x, EDITS)
    if keep_error:
        expected = expected + x - sae(x).x_hat
    expected[:, 0] = x[:, 0]  # BOS
    with SplicedModel(model, sae, HOOK, edits=EDITS, keep_error=keep_error):
        found = activation(model, "layers.2.resid_pre", input_ids=tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_order_of_edits_does_not_matter(sae: SAE) -> None:
    latents = sae.encode(torch.randn(9, D, generator=torch.Generator().manual_seed(3)))
    one = apply_edits(latents, EDITS).to_dense(F)
    swapped = [Edit([21, 3, 8], "set", [-1.0, 2.0, 0.0]), EDITS[2], EDITS[1]]
    other = apply_edits(latents, swapped).to_dense(F)
    assert torch.equal(one, other)


def test_silencing_a_silent_latent_changes_nothing(model: LlamaForCausalLM, sae: SAE) -> None:
    tokens = prompt()
    clean = model(tokens).logits
    active = sae.encode(activation(model, input_ids=tokens)).to_dense(F).amax((0, 1))
    silent = torch.nonzero(active == 0).flatten().tolist()
    assert silent
    for edit in (Edit(silent, "set", 0.0), Edit(silent, "multiply", 7.0), Edit(silent, "add", 0.0)):
        with SplicedModel(model, sae, HOOK, edits=[edit]) as spliced:
            assert torch.equal(spliced(tokens).logits, clean)


def test_without_edits_the_model_is_itself(model: LlamaForCausalLM, sae: SAE) -> None:
    tokens = prompt()
    clean = model(tokens).logits
    spliced = SplicedModel(model, sae, HOOK)
    assert torch.equal(spliced(tokens).logits, clean)
    assert torch.equal(spliced.features.before.to_dense(F), spliced.features.after.to_dense(F))


def test_the_model_is_restored_bit_for_bit(model: LlamaForCausalLM, sae: SAE) -> None:
    tokens = prompt()
    clean = model(tokens).logits
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with SplicedModel(model, sae, HOOK, edits=EDITS, keep_error=False) as spliced:
        assert not torch.equal(spliced(tokens).logits, clean)
    with pytest.raises(RuntimeError, match="stop"), SplicedModel(model, sae, HOOK, edits=EDITS):
        raise RuntimeError("stop")
    assert torch.equal(model(tokens).logits, clean)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def greedy_by_hand(model: LlamaForCausalLM, sae: SAE, tokens: Tensor, new: int, **settings: Any) -> Tensor:
    """Greedy decoding of one row without a cache, the whole row forwarded each time."""
    length = tokens.shape[1]
    for _ in range(new):
        count = range(length) if settings.get("prompt_only") else range(tokens.shape[1])
        with SplicedModel(model, sae, HOOK, edits=EDITS, positions=count, keep_error=settings["keep_error"]) as spliced:
            logits = spliced(tokens).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("prompt_only", [True, False])
@pytest.mark.parametrize("keep_error", [True, False])
def test_generation_with_a_cache_a_batch_and_left_padding(
    model: LlamaForCausalLM, sae: SAE, prompt_only: bool, keep_error: bool
) -> None:
    rows = [prompt(1, 7), prompt(1, 4)]
    settings = {"prompt_only": prompt_only, "keep_error": keep_error}
    expected = [greedy_by_hand(model, sae, row, 6, **settings)[0, row.shape[1] :] for row in rows]
    padded = torch.zeros(2, 7, dtype=torch.int64)
    padded[0], padded[1, 3:] = rows[0][0], rows[1][0]
    mask = torch.ones_like(padded)
    mask[1, :3] = 0
    for more in ({}, {"prefill_chunk_size": 3}):
        spliced = SplicedModel(model, sae, HOOK, edits=EDITS, **settings)
        found = spliced.generate(padded, mask, max_new_tokens=6, do_sample=False, **more)
        assert found[:, 7:].tolist() == [row.tolist() for row in expected]
        applied = spliced.features.applied
        assert applied.shape == (2, 7 + 5)
        assert not applied[1, :4].any()  # padding and BOS
        assert applied[:, 4:7].all()
        assert applied[:, 7:].all() != prompt_only
        assert applied[:, 7:].any() != prompt_only


def test_several_sequences_per_prompt(model: LlamaForCausalLM, sae: SAE) -> None:
    spliced = SplicedModel(model, sae, HOOK, edits=EDITS, prompt_only=True)
    found = spliced.generate(prompt(2, 5), max_new_tokens=4, num_beams=3, num_return_sequences=3, do_sample=False)
    assert found.shape == (6, 9)
    assert not spliced.features.applied[:, 5:].any()
    assert spliced.features.applied[:, 1:5].all()


def test_features_are_those_of_the_processed_tokens(model: LlamaForCausalLM, sae: SAE) -> None:
    tokens = prompt(1, 6)
    spliced = SplicedModel(model, sae, HOOK, edits=[Edit([7], "add", 3.0)], prompt_only=True)
    full = spliced.generate(tokens, max_new_tokens=4, do_sample=False)
    features = spliced.features
    before, after = features.before.to_dense(F), features.after.to_dense(F)
    assert before.shape == (1, 9, F)
    difference = torch.zeros_like(before)
    difference[:, 1:6, 7] = 3.0
    torch.testing.assert_close(after - before, difference)
    # The residual stream at the prompt is the clean one; later tokens see the edited prompt.
    clean = sae.encode(activation(model, input_ids=full[:, :6])).to_dense(F)
    torch.testing.assert_close(before[:, :6], clean, rtol=1e-4, atol=1e-4)


def test_chosen_positions_only(model: LlamaForCausalLM, sae: SAE) -> None:
    tokens = prompt(1, 6)
    spliced = SplicedModel(model, sae, HOOK, edits=EDITS, positions=[2, -1])
    spliced.generate(tokens, max_new_tokens=3, do_sample=False)
    assert spliced.features.applied.tolist() == [[False, False, True, False, False, True, False, False]]


def test_bos_by_choice(model: LlamaForCausalLM, sae: SAE) -> None:
    spliced = SplicedModel(model, sae, HOOK, edits=EDITS, include_bos=True)
    spliced(prompt())
    assert spliced.features.applied.all()


def test_two_hooks_at_once(model: LlamaForCausalLM, sae: SAE) -> None:
    tokens = prompt()
    with SplicedModel(model, sae, "layers.0.resid_post", edits=EDITS) as lower, SplicedModel(model, sae, HOOK) as upper:
        upper(tokens)
        assert torch.equal(lower.features.applied, upper.features.applied)
        changed = sae.encode(activation(model, input_ids=tokens)).to_dense(F)
    assert torch.equal(upper.features.before.to_dense(F), changed)


def slots(pairs: Sequence[tuple[int, float]]) -> SparseLatents:
    return SparseLatents(torch.tensor([[value for _, value in pairs]]), torch.tensor([[index for index, _ in pairs]]))


def pairs(latents: SparseLatents) -> list[tuple[int, float]]:
    return list(zip(latents.indices[0].tolist(), latents.values[0].tolist(), strict=True))


def test_opensae_evicts_the_smallest_slot() -> None:
    start = slots([(4, 3.0), (9, 1.0), (2, 2.0)])
    assert pairs(apply_edits_by_eviction(start, [Edit([9], "set", 5.0)])) == [(4, 3), (9, 5), (2, 2)]
    assert pairs(apply_edits_by_eviction(start, [Edit([7], "set", 0.0)])) == [(4, 3), (7, 0), (2, 2)]
    assert pairs(apply_edits_by_eviction(start, [Edit([7], "add", 4.0)])) == [(4, 3), (7, 4), (2, 2)]
    assert pairs(apply_edits_by_eviction(start, [Edit([7], "multiply", 4.0)])) == pairs(start)
    # The second edit evicts what the first put in.
    assert pairs(apply_edits_by_eviction(start, [Edit([7, 8], "set", -1.0)])) == [(4, 3), (8, -1), (2, 2)]


def test_opensae_mode_replaces_everything(model: LlamaForCausalLM, sae: SAE) -> None:
    tokens = prompt()
    edit = Edit([7], "set", 3.0)
    x = activation(model, input_ids=tokens)
    with SplicedModel(model, sae, HOOK, edits=[edit], opensae_compat=True) as spliced:
        found = activation(model, "layers.2.resid_pre", input_ids=tokens)
        spliced(tokens)
    expected = sae.decode(apply_edits_by_eviction(sae.encode(x), [edit]))
    torch.testing.assert_close(found, expected)
    assert spliced.features.applied.all()


def test_wrong_settings_are_one_line(model: LlamaForCausalLM, sae: SAE) -> None:
    narrow = SAE(SAEConfig(d_model=8, d_latent=16, k=2))
    cases: list[tuple[Any, str]] = [
        (lambda: Edit([1], "scale", 2.0), "edit mode 'scale' is not known"),  # type: ignore[arg-type]
        (lambda: Edit([1, 1], "set", 2.0), "names a latent twice"),
        (lambda: Edit([1, 2], "set", [1.0]), "2 latents has 1 values"),
        (lambda: SplicedModel(model, sae, HOOK, edits=[Edit([F], "set", 1.0)]), f"latent {F} is not in the SAE"),
        (
            lambda: SplicedModel(model, sae, HOOK, edits=[Edit([1], "set", 1.0), Edit([1], "add", 1.0)]),
            "latent 1 is named by two edits",
        ),
        (lambda: SplicedModel(model, narrow, HOOK), "width 8, the model has 16"),
        (
            lambda: SplicedModel(model, sae, "layers.9.resid_post").__enter__(),
            "layers.9.resid_post is not in the model",
        ),
        (lambda: SplicedModel(model, sae, HOOK).features, "no features yet"),
    ]
    for call, message in cases:
        with pytest.raises(GranaryError, match=message):
            call()


def test_prompt_only_needs_to_know_the_prompt(model: LlamaForCausalLM, sae: SAE) -> None:
    tokens = prompt()
    with SplicedModel(model, sae, HOOK, edits=EDITS, prompt_only=True) as spliced:
        cache = cache_in(spliced(tokens[:, :4], use_cache=True))
        with pytest.raises(GranaryError, match="which knows the prompt"):
            spliced(tokens[:, 4:], **continuing(cache))
