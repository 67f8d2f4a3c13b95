"""SAEs on a decoder whose weights bitsandbytes or torchao keep in few bits: seen, replaced, fitted, gone."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import granary
from shared.intervene.attach import attach
from shared.lm import load_trunk
from shared.sae import SAEConfig
from tests.modules import sae_of

pytest.importorskip("torchao", reason="needs the extra quantised: make test-quantised")
pytest.importorskip("bitsandbytes", reason="needs the extra quantised: make test-quantised")

pytestmark = [pytest.mark.quantised, pytest.mark.filterwarnings("ignore")]  # warnings of those packages' own
D = 64
IDS = torch.arange(1, 9)[None]


def kinds(model: torch.nn.Module) -> dict[str, str]:
    """Type of every weight. A state_dict would make bitsandbytes unpack them, after which it rounds otherwise."""
    return {name: f"{type(weight).__name__} of {weight.dtype}" for name, weight in model.named_parameters()}


@pytest.mark.parametrize("scheme", ["torchao_int8", "bnb_int8", "bnb_nf4"])
@pytest.mark.parametrize("target", ["layers.0.resid_post", "layers.1.mlp.down_proj", "layers.1.mlp.up_proj:in"])
def test_attach_to_a_quantised_base(tmp_path: Path, scheme: str, target: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=D, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_trunk(str(tmp_path), "bfloat16", quantisation=scheme)
    clean = model(IDS).last_hidden_state
    weights = kinds(model)
    with attach(model, {target: sae_of(D)}) as saes:
        assert torch.equal(model(IDS).last_hidden_state, clean)
        assert saes.rows(target).shape == (8, D)
        assert saes.latents(target).values.dtype == torch.float32
    with attach(model, {target: sae_of(D)}, mode="replace"):
        assert not torch.equal(model(IDS).last_hidden_state, clean)
    with attach(model, {target: SAEConfig(k=2, expansion=2)}) as saes:
        overrides = ["stream.batch_size=8", "logger.progress=false"]
        granary.fit(saes, [{"input_ids": IDS}], tokens=64, overrides=overrides)
        assert saes[target].config.d_model == D
    assert torch.equal(model(IDS).last_hidden_state, clean)
    assert kinds(model) == weights
