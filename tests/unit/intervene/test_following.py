"""`features` is that of the final sequence, however it was decoded, in every family."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from shared.basics.errors import GranaryError
from shared.intervene.edits import Edit
from shared.intervene.padding import padding_of
from shared.intervene.splice import SplicedModel
from shared.lm import capture
from shared.lm.hookpoint import HookPoint
from shared.sae import SAE, SAEConfig
from tests.cached import cache_in, checkpoint_layers, continuing
from tests.families import FAMILIES, MORE_FAMILIES
from tests.splicing import BOS, HOOK, D, F, K, activation, prompt, tiny_llama

EVERY = {**FAMILIES, **MORE_FAMILIES}
SLOW = ("llama", "qwen2", "qwen3", "gemma3", "gpt2", "phi3", "mistral", "pythia")
CHOSEN = ["gemma2", *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": None},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "chunks": {"prefill_chunk_size": 3},
}
ONE_ROW = ("prompt lookup", "assisted")
NEW = 4


@pytest.fixture(scope="module")
def sae() -> SAE:
    sae = SAE(SAEConfig(d_model=D, d_latent=F, k=K), generator=torch.Generator().manual_seed(3)).requires_grad_(False)
    sae.b_enc.copy_(torch.randn(F, generator=torch.Generator().manual_seed(4)) * 0.2)
    return sae


def made(family: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = EVERY[family]()
    config.eos_token_id = None  # all rows of the same length
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return model


def inputs_of(mode: str) -> tuple[Tensor, Tensor]:
    """A prompt that repeats itself; where the mode takes several rows, the second one padded on the left."""
    row = torch.cat([prompt(1, 5), prompt(1, 5)[:, 1:]], 1)
    if mode in ONE_ROW:
        return row, torch.ones_like(row)
    tokens = row.repeat(2, 1)
    mask = torch.ones_like(tokens)
    tokens[1, :4], mask[1, :4] = 0, 0
    tokens[1, 4] = BOS
    return tokens, mask


def plain(model: PreTrainedModel, sae: SAE, tokens: Tensor, mask: Tensor) -> Tensor:
    """Dense latents of one forward of the clean model. Edits of a layer reach none of its own activations."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    hook = HookPoint.parse(HOOK)
    with torch.no_grad(), capture(model, [hook]) as captured:
        model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    return sae.encode(captured[hook]).to_dense(F)


@pytest.mark.parametrize("family", CHOSEN)
def test_features_are_those_of_the_final_tokens(family: str, sae: SAE) -> None:
    model, assistant = made(family), made(family, seed=1)
    edits = [Edit([3, 7], "add", [2.0, -1.0])]
    for mode, options in MODES.items():
        if mode == "assisted":
            options = {"assistant_model": assistant}
        tokens, prompt_mask = inputs_of(mode)
        torch.manual_seed(5)
        spliced = SplicedModel(model, sae, HOOK, edits=edits)
        settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, **options}
        final = spliced.generate(tokens, prompt_mask, **settings)
        found, length = spliced.features, final.shape[1] - 1
        mask = prompt_mask.repeat_interleave(len(final) // len(tokens), 0)
        mask = nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)
        real = mask.bool()
        assert torch.equal(found.applied, real & (final[:, :length] != BOS)), mode
        wanted = plain(model, sae, final[:, :length], mask)
        torch.testing.assert_close(found.before.to_dense(F)[real], wanted[real], rtol=1e-3, atol=1e-3, msg=mode)
        moved = torch.zeros(F).index_put((torch.tensor([3, 7]),), torch.tensor([2.0, -1.0]))
        edited = wanted + found.applied[..., None] * moved
        torch.testing.assert_close(found.after.to_dense(F)[real], edited[real], rtol=1e-3, atol=1e-3, msg=mode)


def test_a_cropped_cache_takes_back_what_was_behind(sae: SAE) -> None:
    model, tokens = tiny_llama(), prompt(1, 8)
    with torch.no_grad(), SplicedModel(model, sae, HOOK) as spliced:
        cache = cache_in(spliced(tokens[:, :6], use_cache=True))
        cache.crop(-3)
        spliced(tokens[:, 5:8], **continuing(cache), use_cache=True)
        kept = torch.cat([tokens[:, :3], tokens[:, 5:8]], 1)
        wanted = sae.encode(activation(model, input_ids=kept)).to_dense(F)
        torch.testing.assert_close(spliced.features.before.to_dense(F), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_layer_is_on_record_once(sae: SAE, reentrant: bool) -> None:
    tokens, gradients = prompt(), {}
    for checkpointing in (False, True):
        model = tiny_llama().requires_grad_(True).train()
        if checkpointing:
            checkpoint_layers(model, reentrant=reentrant)
        with SplicedModel(model, sae, HOOK, edits=[Edit([3], "add", 2.0)]) as spliced:
            spliced(tokens, labels=tokens, use_cache=False).loss.backward()
        assert spliced.features.applied.shape == tokens.shape
        gradients[checkpointing] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, msg=name)
    with pytest.raises(GranaryError, match="put `with SplicedModel"):
        SplicedModel(model, sae, HOOK)(tokens)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_found_in_any_form_of_mask(attention: str, side: str) -> None:
    model = tiny_llama()
    model.config._attn_implementation = attention
    flat = torch.ones(3, 6, dtype=torch.int64)
    flat[1, :2], flat[2, :5] = 0, 0
    flat = flat if side == "left" else flat.flip(1)
    square = create_causal_mask(model.config, torch.zeros(3, 6, D), flat, **continuing(None))
    shape, device = torch.Size((3, 6)), torch.device("cpu")
    for mask in (flat, flat.bool(), square, {"full_attention": square}, {"other": None, "sliding": square}):
        assert torch.equal(padding_of(mask, 0, shape, device), flat == 0)
    for mask in (None, {}, {"full_attention": None}):
        assert not padding_of(mask, 0, shape, device).any()
    assert torch.equal(padding_of(torch.nn.functional.pad(flat, (0, 9)), 0, shape, device), flat == 0)
    assert torch.equal(padding_of(flat, 2, torch.Size((3, 2)), device), flat[:, 2:4] == 0)
    with pytest.raises(GranaryError, match="attention_mask of type str"):
        padding_of("causal", 0, shape, device)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_padding_is_found_in_a_block_mask() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    flat = torch.ones(3, 6, dtype=torch.int64)
    flat[1, :2], flat[2, :5] = 0, 0

    def causal(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (flat[row, key] == 1)

    mask = create_block_mask(causal, 3, None, 6, 6, device="cpu")
    assert torch.equal(padding_of({"full": mask}, 0, torch.Size((3, 6)), torch.device("cpu")), flat == 0)


class Wrapper(nn.Module):
    """As peft's: another module around the model, which keeps its name for it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.wrapped = model

    def get_base_model(self) -> PreTrainedModel:
        return self.wrapped

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        return self.wrapped.generate(**kwargs)  # type: ignore[operator]


def test_a_wrapped_model_is_spliced(sae: SAE) -> None:
    model, tokens, edits = tiny_llama(), prompt(), [Edit([3], "add", 2.0)]
    want = SplicedModel(model, sae, HOOK, edits=edits)
    logits, sequences = want(tokens).logits, want.generate(tokens, max_new_tokens=3, do_sample=False)
    for wrapped in (Wrapper(model), Wrapper(Wrapper(model))):
        spliced = SplicedModel(wrapped, sae, HOOK, edits=edits)  # type: ignore[arg-type]
        assert torch.equal(spliced(tokens).logits, logits)
        assert torch.equal(spliced.generate(tokens, max_new_tokens=3, do_sample=False), sequences)
        assert torch.equal(spliced.features.applied, want.features.applied)
    with pytest.raises(GranaryError, match="Linear has no module layers"):
        SplicedModel(nn.Linear(2, 2), sae, HOOK)  # type: ignore[arg-type]
