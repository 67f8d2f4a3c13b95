"""A model with adapters of the real peft around it: spliced, attached to and fitted as the model inside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import granary
from shared.basics.errors import GranaryError
from shared.intervene.attach import attach
from shared.intervene.edits import Edit
from shared.intervene.splice import SplicedModel
from shared.sae import SAE, SAEConfig
from tests.modules import sae_of
from tests.splicing import HOOK, D, F, K, activation, prompt, tiny_llama

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

peft = pytest.importorskip("peft", reason="peft is not in this environment: make test-peers")


@pytest.fixture
def model() -> Any:
    """A LLaMA with a LoRA at every projection of queries, which changes what it computes."""
    base = tiny_llama()
    torch.manual_seed(0)
    adapters = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, adapters).eval()


def test_a_model_of_peft_is_spliced(model: Any) -> None:
    sae = SAE(SAEConfig(d_model=D, d_latent=F, k=K), generator=torch.Generator().manual_seed(3)).requires_grad_(False)
    tokens = prompt()
    clean = model(tokens).logits
    spliced = SplicedModel(model, sae, HOOK, edits=[Edit([3], "add", 2.0)])
    assert not torch.equal(spliced(tokens).logits, clean)
    want = sae.encode(activation(model.get_base_model(), input_ids=tokens)).to_dense(F)
    torch.testing.assert_close(spliced.features.before.to_dense(F), want)
    assert spliced.generate(tokens, max_new_tokens=2, do_sample=False).shape == (2, tokens.shape[1] + 2)
    assert torch.equal(model(tokens).logits, clean)
    learnt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(GranaryError, match="learns a prompt"):
        SplicedModel(peft.get_peft_model(tiny_llama(), learnt), sae, HOOK)


@pytest.mark.parametrize("target", [HOOK, "model.layers.1.mlp", "re:.*0.self_attn.q_proj"])
def test_a_model_of_peft_is_attached_to(model: Any, target: str) -> None:
    tokens, bare = prompt(), tiny_llama()(prompt()).logits
    clean = model(tokens).logits
    assert not torch.equal(clean, bare)
    with attach(model, {target: sae_of(D)}) as saes:
        assert torch.equal(model(tokens).logits, clean)
        (place,) = saes
        assert saes.rows(place).shape == (12, D)
    with attach(model, {target: sae_of(D)}, mode="replace"):
        assert not torch.equal(model(tokens).logits, clean)
        with model.disable_adapter():
            assert not torch.equal(model(tokens).logits, bare)
    assert torch.equal(model(tokens).logits, clean)
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, bare)


def test_a_fit_on_a_model_of_peft_leaves_base_and_adapters_bit_equal(model: Any) -> None:
    def tensors(of: nn.Module) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in of.state_dict().items()}

    names: Callable[[], list[str]] = lambda: [name for name, _ in model.named_modules()]  # noqa: E731
    before, before_names = tensors(model), names()
    overrides = ["stream.batch_size=8", "logger.progress=false"]
    with attach(model, {HOOK: SAEConfig(k=2, expansion=2)}) as saes:
        granary.fit(saes, [{"input_ids": prompt()}], tokens=64, overrides=overrides)
    after = tensors(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert names() == before_names
