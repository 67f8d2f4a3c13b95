"""A dictionary spliced into any module of any model: the places, the tokens and the generation that those of a decoder
have, where there are such."""

from dataclasses import replace

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.intervene.attach import attach
from shared.intervene.edits import Edit, apply_edits
from shared.intervene.splice import SplicedModel
from shared.sae.sites import Sites
from shared.sae.variants.transcoder import Transcoder, TranscoderConfig
from tests.modules import CASES, MLP, llava, llava_inputs, noise, sae_of, seeded
from tests.splicing import HOOK, prompt, tiny_llama
from tests.unit.intervene.test_attach import hooks_of, run, same

EDITS = [Edit([1], "set", 9.0)]


@pytest.mark.parametrize("name", CASES)
def test_a_splice_goes_on_from_what_an_attachment_goes_on_from(name):
    case = CASES[name]
    model, inputs, sae = case.make(), case.inputs(), sae_of(case.width)
    clean = run(model, inputs)
    hooks = hooks_of(model)
    with attach(model, {case.target: sae}, mode="replace") as saes:
        replaced, (place,) = run(model, inputs), saes
        latents = saes.latents(place)
    with attach(model, {case.target: sae}, mode="replace", keep_error=True, edits={place: EDITS}):
        edited = run(model, inputs)
    spliced = SplicedModel(model, sae, case.target)
    assert same(run(spliced, inputs), clean)
    assert torch.equal(spliced.features.before.indices, latents.indices)
    assert spliced.features.applied.sum() == case.rows
    assert same(run(SplicedModel(model, sae, case.target, keep_error=False), inputs), replaced)
    assert same(run(SplicedModel(model, sae, case.target, edits=EDITS), inputs), edited)
    assert same(run(model, inputs), clean)
    assert hooks_of(model) == hooks


def test_a_transcoder_of_any_two_modules_is_spliced_by_the_places_that_it_records():
    model, x = seeded(MLP)(), noise(4, 6)
    config = TranscoderConfig(d_in=6, d_out=12, d_latent=24, k=3, pre_bias=False)
    with pytest.raises(GranaryError, match="does not record where"):
        SplicedModel(model, Transcoder(config))
    placed = replace(config, sites=Sites(("fc1:in",), ("fc1",)))
    made = Transcoder(placed, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    with torch.no_grad(), SplicedModel(model, made, edits=EDITS, keep_error=False) as spliced:
        found = spliced(x)
        hidden = made.decode(apply_edits(made.encode(x), EDITS))
        assert torch.equal(found, model.fc2(model.batch_norm(model.norm(hidden.relu()))))


def test_padding_is_found_wherever_the_mask_is_given():
    """Arguments by position count as those by name: a tuple is called with what a mapping names."""
    model, tokens = tiny_llama(), torch.cat([torch.zeros(2, 2, dtype=torch.int64), prompt()], 1)
    mask = (tokens != 0).long()
    tokens[:, :2] = 9  # padding by the mask alone
    real = mask.bool() & (tokens != 1)
    with attach(model, {HOOK: sae_of(16)}) as saes:
        model(tokens, mask)
        assert len(saes.rows(HOOK)) == real.sum()
    for place in (HOOK, "model.layers.1", "lm_head:in"):
        with SplicedModel(model, sae_of(16), place, edits=EDITS) as spliced:
            spliced(tokens, mask)
            assert torch.equal(spliced.features.applied, real)


def test_a_module_of_a_decoder_follows_tokens_as_its_site_does():
    model, ids = tiny_llama(), torch.cat([torch.zeros(2, 2, dtype=torch.int64), prompt()], 1)
    settings = {"attention_mask": (ids != 0).long(), "max_new_tokens": 4, "do_sample": False}
    for choice in ({}, {"prompt_only": True}, {"positions": [2, -1]}):
        by_site = SplicedModel(model, sae_of(16), HOOK, edits=EDITS, **choice)
        by_module = SplicedModel(model, sae_of(16), "model.layers.1", edits=EDITS, **choice)
        assert torch.equal(by_module.generate(ids, **settings), by_site.generate(ids, **settings))
        assert torch.equal(by_module.features.applied, by_site.features.applied)
        assert torch.equal(by_module.features.after.values, by_site.features.after.values)


def test_a_vision_tower_is_spliced_while_text_is_generated():
    model, given = seeded(llava)(), llava_inputs()
    ids, mask, pixels = given["input_ids"], given["attention_mask"], given["pixel_values"]
    settings = {"pixel_values": pixels, "max_new_tokens": 3, "do_sample": False, "output_logits": True}
    settings["return_dict_in_generate"] = True
    clean = model.generate(input_ids=ids, attention_mask=mask, **settings)
    spliced = SplicedModel(model, sae_of(12), "model.vision_tower.encoder.layers.0", edits=EDITS)
    made = spliced.generate(ids, mask, **settings)
    assert not torch.equal(made.logits[0], clean.logits[0])
    assert spliced.features.applied.shape == (2, 5)
    for choice in ({"prompt_only": True}, {"positions": [0]}):
        with pytest.raises(GranaryError, match="not of the tokens of the forward"):
            SplicedModel(model, sae_of(12), "model.vision_tower.encoder.layers.0", **choice)(**given)
    with pytest.raises(GranaryError, match="leave num_beams=1"):
        spliced.generate(ids, mask, pixel_values=pixels, num_beams=2)


def test_what_a_model_lacks_is_said():
    model = seeded(MLP)()
    for make, told in (
        (lambda: SplicedModel(model, sae_of(12), "fc3"), "has no module fc3: did you mean"),
        (lambda: SplicedModel(model, sae_of(12), "re:fc."), "re:fc. names 2 places, fc1, fc2"),
        (lambda: SplicedModel(model, sae_of(12), "fc1", prompt_only=True)(noise(4, 6)), "not of the tokens"),
        (lambda: SplicedModel(model, sae_of(13), "fc1")(noise(4, 6)), "width 13, got 12"),
        (lambda: SplicedModel(model, sae_of(12), "fc1").generate(prompt()), "MLP does not continue token ids"),
    ):
        with pytest.raises(GranaryError, match=told):
            make()
    assert hooks_of(model) == 0
