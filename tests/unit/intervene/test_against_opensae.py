"""What goes wrong in OpenSAE's TransformerWithSae, one test for each fault: here it does not."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shared.intervene.edits import Edit
from shared.intervene.splice import SplicedModel
from shared.sae import SAE, SAEConfig
from tests.splicing import HOOK, VOCAB, D, F, K, activation, prompt, tiny_llama


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def sae() -> SAE:
    config = SAEConfig(d_model=D, d_latent=F, k=K, normalisation="none")
    return SAE(config, generator=torch.Generator().manual_seed(0)).requires_grad_(False)


def silent_latents(sae: SAE, x: Tensor) -> list[int]:
    return torch.nonzero(sae.encode(x).to_dense(F).amax((0, 1)) == 0).flatten().tolist()


def test_ablating_an_inactive_latent_evicts_no_active_one(model: LlamaForCausalLM, sae: SAE) -> None:
    tokens = prompt()
    clean = model(tokens).logits
    silent = silent_latents(sae, activation(model, HOOK, input_ids=tokens))
    spliced = SplicedModel(model, sae, HOOK, edits=[Edit([silent[0]], "set", 0.0)])
    assert torch.equal(spliced(tokens).logits, clean)
    compat = SplicedModel(model, sae, HOOK, edits=[Edit([silent[0]], "set", 0.0)], opensae_compat=True)
    plain = SplicedModel(model, sae, HOOK, opensae_compat=True)
    assert not torch.equal(compat(tokens).logits, plain(tokens).logits)  # the fault, on request


def test_edited_latents_do_not_evict_one_another(model: LlamaForCausalLM, sae: SAE) -> None:
    tokens = prompt()
    silent = silent_latents(sae, activation(model, HOOK, input_ids=tokens))[:2]
    spliced = SplicedModel(model, sae, HOOK, edits=[Edit(silent, "set", -1.0)], include_bos=True)
    spliced(tokens)
    assert (spliced.features.after.to_dense(F)[..., silent] == -1).all()
    compat = SplicedModel(model, sae, HOOK, edits=[Edit(silent, "set", -1.0)], opensae_compat=True)
    compat(tokens)
    left = compat.features.after.to_dense(F)[..., silent]
    assert (left[..., 0] == 0).all()
    assert (left[..., 1] == -1).all()


def test_each_latent_may_have_its_own_value(model: LlamaForCausalLM, sae: SAE) -> None:
    spliced = SplicedModel(model, sae, HOOK, edits=[Edit([3, 8], "set", [2.0, 5.0])], include_bos=True)
    spliced(prompt())
    after = spliced.features.after.to_dense(F)
    assert (after[..., 3] == 2).all()
    assert (after[..., 8] == 5).all()


def test_features_of_prompt_and_generated_tokens_are_all_before_and_all_after(
    model: LlamaForCausalLM, sae: SAE
) -> None:
    edit = Edit([7], "add", 100.0)
    spliced = SplicedModel(model, sae, HOOK, edits=[edit], include_bos=True)
    spliced.generate(prompt(1, 4), max_new_tokens=5, do_sample=False)
    before, after = (part.to_dense(F) for part in (spliced.features.before, spliced.features.after))
    assert before.shape == after.shape == (1, 4 + 4, F)
    assert (before[..., 7] < 100).all()
    assert (after[..., 7] >= 100).all()


def test_prompt_only_is_a_matter_of_position_not_of_the_first_call(model: LlamaForCausalLM, sae: SAE) -> None:
    """Chunked prefill makes several calls for one prompt; a second generate begins anew."""
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    spliced = SplicedModel(model, sae, HOOK, edits=[Edit([7], "add", 9.0)], prompt_only=True)
    for more in ({}, {"prefill_chunk_size": 2}, {}):
        spliced.generate(prompt(1, 6), **settings, **more)
        assert spliced.features.applied.tolist() == [[False, *[True] * 5, False, False]]


def test_prompt_only_works_at_two_hooks(model: LlamaForCausalLM, sae: SAE) -> None:
    tokens = prompt(1, 5)
    clean = model.generate(tokens, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True)
    edit = [Edit([7], "add", 9.0)]
    with (
        SplicedModel(model, sae, "layers.0.resid_post", prompt_only=True),
        SplicedModel(model, sae, HOOK, edits=edit, prompt_only=True) as upper,
    ):
        found = upper.generate(
            tokens, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert not torch.equal(found.logits[0], clean.logits[0])
    assert upper.features.applied.tolist() == [[False, *[True] * 4, False]]


def test_the_first_positional_argument_is_the_tokens(model: LlamaForCausalLM, sae: SAE) -> None:
    tokens = prompt()
    assert torch.equal(SplicedModel(model, sae, HOOK)(tokens).logits, model(input_ids=tokens).logits)


def test_hooks_are_gone_afterwards_even_after_an_error(model: LlamaForCausalLM, sae: SAE) -> None:
    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    count = hooks()
    with pytest.raises(IndexError), SplicedModel(model, sae, HOOK):
        model(torch.tensor([[VOCAB + 7]]))
    assert hooks() == count


def test_it_can_observe_without_replacing(model: LlamaForCausalLM, sae: SAE) -> None:
    spliced = SplicedModel(model, sae, HOOK)
    tokens = prompt()
    assert torch.equal(spliced(tokens).logits, model(tokens).logits)
    assert spliced.features.before.values.shape == (2, 7, K)


def test_gradients_pass(model: LlamaForCausalLM, sae: SAE) -> None:
    embeddings = model.get_input_embeddings()(prompt()).requires_grad_()
    with SplicedModel(model, sae, HOOK, edits=[Edit([7], "multiply", 3.0)]):
        model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_a_bfloat16_model_stays_bfloat16(sae: SAE) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        dtype="bfloat16",
    )
    half = LlamaForCausalLM(config).eval().requires_grad_(False).bfloat16()
    tokens = prompt()
    clean = half(tokens).logits
    spliced = SplicedModel(half, sae, HOOK, edits=[Edit([7], "add", 3.0)])
    found = spliced(tokens).logits
    assert found.dtype == torch.bfloat16
    assert not torch.equal(found, clean)
    assert torch.equal(half(tokens).logits, clean)
    assert torch.equal(SplicedModel(half, sae, HOOK)(tokens).logits, clean)
