"""SAEConfig and the Hydra group that fills it."""

import dataclasses
from importlib import resources

import pytest
from omegaconf import OmegaConf

from shared.errors import GranaryError
from shared.sae import SAEConfig, SAESchema


def yaml_options():
    return sorted(path.name for path in (resources.files("conf") / "sae").iterdir() if path.name.endswith(".yaml"))


def test_json_round_trip():
    config = SAEConfig(d_model=8, d_latent=64, k=4, auxk_k=3, loss="fvu_per_dim", multi_topk_weight=0.125)
    assert SAEConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 65}, "sae.k=65 is more than the 64 latents"),
        ({"k": 0}, "sae.k=0"),
        ({"activation": "softmax"}, "sae.activation='softmax'"),
        ({"normalisation": "batch"}, "sae.normalisation='batch'"),
        ({"loss": "mse"}, "sae.loss='mse'"),
        ({"bias_init": "median"}, "sae.bias_init='median'"),
        ({"auxk_alpha": -1.0}, "sae.auxk_alpha=-1.0"),
        ({"multi_topk_weight": float("nan")}, "sae.multi_topk_weight=nan"),
        ({"auxk_k": 0}, "sae.auxk_k=0"),
        ({"dead_after_tokens": 0}, "sae.dead_after_tokens=0"),
    ],
)
def test_nonsense_is_one_clear_line(fields, message):
    with pytest.raises(GranaryError, match=message):
        SAEConfig(**{"d_model": 8, "d_latent": 64, "k": 4, **fields})


def test_unknown_and_missing_keys_are_named():
    fields = SAEConfig(d_model=8, d_latent=64, k=4).to_dict()
    with pytest.raises(GranaryError, match="unknown keys topk_value"):
        SAEConfig.from_dict({**fields, "topk_value": 1})
    del fields["k"]
    with pytest.raises(GranaryError, match=r"incomplete.*'k'"):
        SAEConfig.from_dict(fields)


def test_schema_has_the_fields_of_the_config():
    schema = {field.name: field.type for field in dataclasses.fields(SAESchema)}
    config = {field.name: field.type for field in dataclasses.fields(SAEConfig)}
    del schema["expansion"], schema["d_latent"], config["d_model"], config["d_latent"]
    del config["shift_back"]  # for SAEs loaded from elsewhere: false cannot be trained
    assert schema == config


@pytest.mark.parametrize("option", yaml_options())
def test_every_option_fills_the_schema(option):
    values = OmegaConf.create((resources.files("conf") / "sae" / option).read_text())
    del values["defaults"]
    filled = OmegaConf.merge(OmegaConf.structured(SAESchema), values)
    config = OmegaConf.to_object(filled).to_config(64)
    assert config.d_latent == round(values.expansion * 64)
    assert config.k == values.k


def test_width_by_expansion_or_by_d_latent():
    fields = dataclasses.asdict(SAEConfig(d_model=1, d_latent=1, k=1))
    del fields["d_model"], fields["shift_back"]
    assert SAESchema(expansion=2.5, **{**fields, "d_latent": None}).to_config(4).d_latent == 10
    assert SAESchema(expansion=2.5, **{**fields, "d_latent": 7}).to_config(4).d_latent == 7
    with pytest.raises(GranaryError, match="expansion=0"):
        SAESchema(expansion=0, **{**fields, "d_latent": None}).to_config(4)
