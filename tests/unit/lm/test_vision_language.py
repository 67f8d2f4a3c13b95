"""The text stack of vision-language models has the hooks of a decoder, and DeepStack's streams are right or refused."""

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.intervene.attach import attach
from shared.intervene.edits import Edit
from shared.intervene.splice import SplicedModel
from shared.lm import capture
from shared.lm.head import head_size, load_head
from shared.lm.hookpoint import HookPoint
from shared.lm.places import decoder_blocks, text_stack
from shared.lm.targets import resolve
from tests.modules import sae_of
from tests.vision_language import IMAGE, MODELS

DEEP = 2  # layers of the small Qwen3-VL behind which features of the image are added


def streams(name):
    """The model's inputs, its image tokens bool [T], and [T, d] of every hook that it has."""
    make, inputs = MODELS[name]
    model, given = make().eval(), inputs()
    deep = DEEP if name == "qwen3_vl" else 0
    sites = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    hooks = [HookPoint(layer, site) for layer in range(len(decoder_blocks(model))) for site in sites]
    hooks = [hook for hook in hooks if hook.site != "resid_post" or hook.layer >= deep]
    with torch.no_grad(), capture(model, hooks) as captured:
        model(**given)
    image = given["input_ids"][0] == (49 if name == "llava" else IMAGE)
    return model, image, {hook: activation[0] for hook, activation in captured.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_is_what_its_branches_add(name):
    model, image, found = streams(name)
    layers, deep = len(decoder_blocks(model)), DEEP if name == "qwen3_vl" else 0
    assert image.sum() in (4, 6)
    for layer in range(layers):
        before, middle, attention, mlp = (
            found[HookPoint(layer, site)] for site in ("resid_pre", "resid_mid", "attn_out", "mlp_out")
        )
        torch.testing.assert_close(middle, before + attention, rtol=1e-4, atol=1e-4)
        if layer >= deep:
            torch.testing.assert_close(found[HookPoint(layer, "resid_post")], middle + mlp, rtol=1e-4, atol=1e-4)
        if layer + 1 < layers:
            far = (found[HookPoint(layer + 1, "resid_pre")] - middle - mlp).norm(dim=-1)
            assert bool((far[~image] < 1e-4).all())
            assert bool((far[image] > 1e-2).all()) == (layer < deep)
            assert bool((far[image] < 1e-4).all()) == (layer >= deep)


def test_deepstack_resid_post_is_no_stream_and_is_refused():
    model = MODELS["qwen3_vl"][0]()
    for layer in range(DEEP):
        with pytest.raises(GranaryError, match=rf"DeepStack\): choose layers\.{layer + 1}\.resid_pre"):
            resolve(model, f"layers.{layer}.resid_post")
    assert resolve(model, f"layers.{DEEP}.resid_post") == [HookPoint(DEEP, "resid_post")]
    assert resolve(model, "layers.1.resid_pre") == [HookPoint(1, "resid_pre")]


@pytest.mark.parametrize("name", MODELS)
def test_a_site_of_the_text_stack_is_attached_and_spliced(name):
    make, inputs = MODELS[name]
    model, given, hook = make().eval(), inputs(), "layers.1.resid_pre"
    with torch.no_grad():
        clean = model(**given).logits
    path = next(path for path, module in model.named_modules() if module is text_stack(model))
    with attach(model, {hook: sae_of(16), f"{path}.layers.1:in": sae_of(16)}) as saes, torch.no_grad():
        assert torch.equal(model(**given).logits, clean)
        assert torch.equal(saes.rows(hook), saes.rows(f"{path}.layers.1:in"))
        assert len(saes.rows(hook)) == given["input_ids"].shape[1] - 1  # BOS
    with torch.no_grad(), SplicedModel(model, sae_of(16), hook) as spliced:
        assert torch.equal(spliced(**given).logits, clean)
        assert not spliced.features.applied[0, 0]
    with (
        torch.no_grad(),
        SplicedModel(model, sae_of(16), hook, edits=[Edit([1], "set", 9.0)], positions=[-1]) as spliced,
    ):
        changed = (spliced(**given).logits != clean).any(-1)[0]
        assert changed.tolist() == [False] * (len(changed) - 1) + [True]
    ids, mask = given.pop("input_ids"), given.pop("attention_mask")
    settings = {**given, "max_new_tokens": 3, "do_sample": False}
    want = model.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(SplicedModel(model, sae_of(16), hook).generate(ids, mask, **settings), want)


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_that_of_the_whole_model(name, tmp_path):
    """Logit weights of a latent need the final norm and the output embedding, beside one layer of text."""
    model = MODELS[name][0]().eval()
    norm = text_stack(model).norm
    torch.nn.init.normal_(norm.weight, std=0.3)
    model.save_pretrained(tmp_path)
    head = load_head(str(tmp_path))
    gain = 1 + norm.weight if name == "gemma3" else norm.weight
    assert torch.equal(head.W_VD, model.get_output_embeddings().weight.float())
    torch.testing.assert_close(head.gain_D, gain.float(), rtol=1e-3, atol=1e-3)
    assert head_size(str(tmp_path))[1] == len(head.W_VD)
