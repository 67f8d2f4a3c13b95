"""A Lorsa in the place of the attention that it reads: whatever sees what in a forward, it sees the same."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import LlamaForCausalLM

from shared.basics.errors import GranaryError
from shared.intervene.edits import Edit
from shared.intervene.padding import attended
from shared.intervene.splice import SplicedModel
from shared.lm import packed_inputs
from shared.lm.packed import DOCUMENT_SDPA, segment_positions
from shared.sae import SAE, Lorsa, SAEConfig
from shared.sae.contexts import Contexts
from shared.sae.sites import SiteWidths
from stage_eval.measure.downstream import Batch, Condition, Splice
from stage_eval.measure.passes import reconstruct
from stage_eval.measure.session import Loaded
from tests.cached import cache_in, continuing
from tests.splicing import ATTENTION, BOS, HOOK, D, attention_itself, final_hidden, prompt, tiny_llama
from tests.unit.intervene.test_recomputation import assert_same, batches, gradients, trainable
from tests.unit.intervene.test_variants import fitted

T, CPU = 8, torch.device("cpu")
SEGMENTS = torch.tensor([[0] * 3 + [1] * 5, [0] * 6 + [1] * 2])
LEFT = torch.tensor([[0] * 3 + [1] * 5, [1] * T])


def sees_documents(dtype: torch.dtype) -> Tensor:
    """Causal within `SEGMENTS`, [B, 1, T, T]; of floating point as what is added to scores."""
    seen = (torch.ones(T, T).tril() > 0) & (SEGMENTS[:, :, None] == SEGMENTS[:, None])
    least = torch.finfo(dtype if dtype.is_floating_point else torch.float32).min
    return (seen if dtype == torch.bool else torch.where(seen, 0.0, least))[:, None]


RESTARTS = segment_positions(SEGMENTS)
FORWARDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "padded on the left": {"attention_mask": LEFT, "position_ids": (LEFT.cumsum(1) - 1).clamp_min(0)},
    "padded on the left, positions as they come": {"attention_mask": LEFT},
    "padded on the right": {"attention_mask": LEFT.flip(1)},
    "documents by their positions": {"position_ids": RESTARTS, "use_cache": False},
    "documents by who sees whom": {"attention_mask": sees_documents(torch.bool), "position_ids": RESTARTS},
    "documents by what is added": {"attention_mask": sees_documents(torch.float32), "position_ids": RESTARTS},
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def itself(model: LlamaForCausalLM) -> Lorsa:
    return attention_itself(model).requires_grad_(False)


def assert_nothing_changes(model: LlamaForCausalLM, itself: Lorsa, inputs: dict[str, Any], real: Tensor) -> None:
    """The attention's stand-in in its place gives the logits of the clean model; and it has said what it did there."""
    clean = model(**inputs).logits
    with SplicedModel(model, itself, keep_error=False, include_bos=True) as spliced:
        found = spliced(**inputs).logits
        features = spliced.features
    torch.testing.assert_close(found[real], clean[real], atol=1e-4, rtol=1e-4)
    assert torch.equal(features.applied, real)
    assert bool((features.before.indices[~real] < 0).all())
    assert bool((features.before.indices[real] >= 0).any(-1).all())


@torch.no_grad()
@pytest.mark.parametrize("given", FORWARDS)
def test_it_sees_what_the_attention_sees(model: LlamaForCausalLM, itself: Lorsa, given: str) -> None:
    inputs = FORWARDS[given]
    real = torch.ones(2, T, dtype=torch.bool)
    if "padded" in given:
        real = inputs["attention_mask"].bool()
    assert_nothing_changes(model, itself, {"input_ids": prompt(2, T), **inputs}, real)


def test_who_sees_whom_by_every_form_of_mask() -> None:
    """Of several kinds of layers, those that see everything say it."""
    seen = sees_documents(torch.bool)
    block = create_block_mask(lambda b, _, q, k: (q >= k) & (SEGMENTS[b, q] == SEGMENTS[b, k]), 2, None, T, T, "cpu")
    by_kind = {"sliding_attention": ~seen, "full_attention": seen}
    for mask in (seen, seen[:, 0], sees_documents(torch.float32), block, by_kind):
        assert torch.equal(attended(mask, SEGMENTS.shape, CPU), seen[:, 0])
    for mask in ("flash", torch.ones(1, 1, 1, 1)):
        with pytest.raises(GranaryError, match="does not say which tokens see one another"):
            attended(mask, SEGMENTS.shape, CPU)


@torch.no_grad()
@pytest.mark.parametrize("isolated", [True, False])
def test_it_sees_the_documents_of_packed_contexts(isolated: bool) -> None:
    model = tiny_llama()
    model.set_attn_implementation(DOCUMENT_SDPA)
    inputs = packed_inputs(model, prompt(2, T), SEGMENTS, isolated=isolated)
    assert_nothing_changes(model, attention_itself(model), inputs, torch.ones(2, T, dtype=torch.bool))


@torch.no_grad()
def test_the_splice_of_the_evaluation_and_one_by_hand(model: LlamaForCausalLM) -> None:
    made, tokens = fitted(model, "lorsa"), prompt(2, T)
    assert isinstance(made, Lorsa)
    with SplicedModel(model, made, keep_error=False) as spliced:
        logits = spliced(tokens).logits
    run = Batch(tokens, torch.zeros_like(tokens), "joined", tokens != BOS, torch.ones_like(tokens, dtype=torch.bool))
    splice = Splice(ATTENTION, reconstruct(Loaded("lorsa", ATTENTION, SiteWidths((D,), (D,)), made)))
    hidden = final_hidden(model, run, Condition("lorsa", (splice,)))
    torch.testing.assert_close(model.lm_head(hidden).view_as(logits), logits, atol=1e-5, rtol=1e-5)

    def replaced(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        x_BTD = kwargs["hidden_states"]
        made_BTD = torch.where((tokens != BOS)[..., None], made(Contexts.whole(x_BTD)).x_hat.view_as(x_BTD), output[0])
        return (made_BTD, *output[1:])

    handle = model.model.layers[1].self_attn.register_forward_hook(replaced, with_kwargs=True)
    by_hand = model(tokens).logits
    handle.remove()
    torch.testing.assert_close(by_hand, logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(tokens).logits, logits, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("given", [{}, {"use_cache": False}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_generates_as_the_attention_does(model: LlamaForCausalLM, itself: Lorsa, given: dict[str, Any]) -> None:
    """Token by token from a cache, rows of unequal length; what was read before stays what later tokens attend to."""
    tokens, mask = prompt(2, T), LEFT
    asked = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, **given}
    torch.manual_seed(0)
    clean = model.generate(tokens, attention_mask=mask, **asked)
    torch.manual_seed(0)
    with SplicedModel(model, itself, keep_error=False, include_bos=True) as spliced:
        found = spliced.generate(tokens, mask, **asked)
        before = spliced.features.before
    assert torch.equal(found.sequences, clean.sequences)
    torch.testing.assert_close(found.logits, clean.logits, atol=1e-4, rtol=1e-4)
    whole = found.sequences[:, :-1]
    rows = mask.repeat_interleave(len(whole) // 2, 0)
    rows = torch.nn.functional.pad(rows, (0, whole.shape[1] - T), value=1)
    with SplicedModel(model, itself, keep_error=False, include_bos=True) as spliced:
        spliced(whole, attention_mask=rows, position_ids=(rows.cumsum(1) - 1).clamp_min(0))
        anew = spliced.features.before
    F = itself.config.d_latent
    torch.testing.assert_close(before.to_dense(F), anew.to_dense(F), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_edit_reaches_what_the_latent_writes_at_chosen_tokens(model: LlamaForCausalLM) -> None:
    made, tokens = fitted(model, "lorsa"), prompt()
    with SplicedModel(model, made, edits=[Edit([3], "set", 4.0)], positions=[2]) as spliced:
        spliced(tokens)
        before, after = (one.to_dense(60) for one in (spliced.features.before, spliced.features.after))
    assert bool((after[:, 2, 3] == 4).all())
    after[:, 2, 3] = before[:, 2, 3]
    assert torch.equal(after, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_run_again_read_their_own_forward(reentrant: bool) -> None:
    found = []
    for recomputes in (None, reentrant):
        model, inputs = trainable(recomputes), batches([(2, 7), (3, 5)])
        made = fitted(tiny_llama(), "lorsa")
        with SplicedModel(model, made, edits=[Edit([3], "set", 2.0)], keep_error=False) as spliced:
            found.append(gradients(model, spliced, inputs))
    assert_same(found[1], found[0])


def cached(model: LlamaForCausalLM, spliced: SplicedModel) -> None:
    cache = cache_in(model(prompt(2, 4), use_cache=True))
    with spliced:
        model(prompt(2, 1), **continuing(cache))


def with_beams_of_another(model: LlamaForCausalLM, spliced: SplicedModel) -> None:
    sae = SAE(SAEConfig(d_model=D, d_latent=20, k=3))
    with spliced, SplicedModel(model, sae, HOOK) as outer:
        outer.generate(prompt(2, 4), num_beams=2, max_new_tokens=2)


def from_a_cache(model: LlamaForCausalLM, spliced: SplicedModel) -> None:
    tokens = prompt(2, 4)
    made = spliced.generate(tokens, max_new_tokens=2, return_dict_in_generate=True)
    spliced.generate(tokens, max_new_tokens=3)
    spliced.generate(made.sequences, **continuing(cache_in(made)), max_new_tokens=2)


AHEAD = {"attention_mask": torch.ones(2, 1, T, T, dtype=torch.bool)}
BETWEEN = {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]] * 2)}
REFUSED: dict[str, tuple[Any, str]] = {
    "a cache from elsewhere": (cached, r"it has those of spliced\.generate\(\.\.\.\) alone"),
    "a cache of an earlier call": (from_a_cache, "leave the cache out"),
    "beams": (lambda _, spliced: spliced.generate(prompt(2, 4), num_beams=2), "leave num_beams=1"),
    "beams of another splice": (with_beams_of_another, "leave num_beams=1"),
    "tokens that see later ones": (lambda _, spliced: spliced(prompt(2, T), **AHEAD), "attends causally within doc"),
    "padding between tokens": (lambda _, spliced: spliced(prompt(2, T), **BETWEEN), "padding lies between tokens"),
    "positions that restart before a cache": (
        lambda _, spliced: spliced(prompt(2, T), position_ids=RESTARTS),
        "these position_ids jump where tokens see one another",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("given", REFUSED)
def test_what_it_cannot_follow_is_one_line(model: LlamaForCausalLM, itself: Lorsa, given: str) -> None:
    clean = model(prompt()).logits
    work, told = REFUSED[given]
    with pytest.raises(GranaryError, match=told) as raised:
        work(model, SplicedModel(model, itself, keep_error=False))
    assert "\n" not in str(raised.value)
    assert torch.equal(model(prompt()).logits, clean)
