"""What a dictionary is, how it is learnt, and the Hydra group that fills both."""

import dataclasses
import json
from importlib import resources

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import stage_train.config
from shared.basics.errors import GranaryError
from shared.sae import SAE, SAEConfig
from shared.sae.folder import from_document, to_document
from shared.sae.learn.config import LearningConfig, check
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants.transcoder import TranscoderConfig
from stage_train.sae_schema import SAESchema
from tests.learning import split_fields


def yaml_options():
    return sorted(path.name[:-5] for path in (resources.files("conf") / "sae").iterdir() if path.name.endswith(".yaml"))


def round_trip(config, learning):
    """Through the JSON of a dictionary's folder."""
    document = json.loads(json.dumps(to_document(config, learning.to_dict(), {"steps": 3})))
    found = from_document(document, document["provenance"])
    assert found.provenance == {"steps": 3}
    return found.config([SAEConfig, TranscoderConfig]), LearningConfig.from_dict(found.training)


def test_json_round_trip():
    learning = LearningConfig(auxk_k=3, loss="fvu_per_dim", multi_topk_weight=0.125, prefixes=(8, 64))
    sae = SAEConfig(d_model=8, d_latent=64, k=4, sites=Sites.of("layers.2.resid_post"))
    sites = Sites(("layers.2.mlp_in",), ("layers.2.mlp_out",))
    transcoder = TranscoderConfig(d_in=8, d_out=6, d_latent=64, k=4, pre_bias=False, sites=sites)
    for config in (sae, transcoder, dataclasses.replace(sae, sites=None)):
        assert round_trip(config, learning) == (config, learning)


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
        ({"auxk_slope": -0.1}, "sae.auxk_slope=-0.1"),
        ({"multi_topk_weight": float("nan")}, "sae.multi_topk_weight=nan"),
        ({"auxk_k": 0}, "sae.auxk_k=0"),
        ({"dead_after_tokens": 0}, "sae.dead_after_tokens=0"),
    ],
)
def test_nonsense_is_one_clear_line(fields, message):
    with pytest.raises(GranaryError, match=message):
        split_fields({"d_model": 8, "d_latent": 64, "k": 4, **fields})


def test_unknown_and_missing_keys_are_named():
    config = SAEConfig(d_model=8, d_latent=64, k=4)
    fields = config.own_fields()
    with pytest.raises(GranaryError, match="unknown keys topk_value"):
        SAEConfig.of(config.widths, {**fields, "topk_value": 1})
    del fields["d_latent"]
    with pytest.raises(GranaryError, match=r"incomplete.*'d_latent'"):
        SAEConfig.of(config.widths, fields)


def test_an_open_config_becomes_one_of_a_width():
    expanding = SAEConfig(k=4, expansion=2.5, pre_bias=False)
    assert expanding.for_width(8) == SAEConfig(d_model=8, d_latent=20, k=4, pre_bias=False)
    assert SAEConfig(k=4, d_latent=20).for_width(8) == SAEConfig(d_model=8, d_latent=20, k=4)
    assert SAEConfig(d_model=8, expansion=2.5, k=4) == SAEConfig(d_model=8, d_latent=20, k=4)
    assert "expansion" not in expanding.for_width(8).own_fields()
    with pytest.raises(GranaryError, match="no width yet: give d_model"):
        SAE(expanding)
    with pytest.raises(GranaryError, match="is for activations of width 8, these have 9"):
        expanding.for_width(8).for_width(9)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"k": 4, "expansion": 0.0}, "expansion=0.0: must be positive"),
        ({"k": 4, "expansion": 2.0, "d_latent": 3}, "give one"),
        ({"k": 4, "expansion": 2.0, "activation": "topp"}, "choose from topk"),
        ({"expansion": 2.0}, "needs sae.k"),
        ({"k": 4}, "must be at least 1"),
    ],
)
def test_an_open_config_that_makes_no_sense_at_any_width_is_refused_at_once(fields, told):
    with pytest.raises(GranaryError, match=told):
        SAEConfig(**fields)


def test_a_training_record_of_a_newer_version_does_not_keep_a_dictionary_from_loading():
    assert LearningConfig.from_dict({"auxk_k": 3, "something_new": 1}) == LearningConfig(auxk_k=3)


def test_schema_has_the_fields_of_the_config():
    schema = {field.name: field.type for field in dataclasses.fields(SAESchema)}
    both = (*dataclasses.fields(SAEConfig), *dataclasses.fields(LearningConfig))
    config = {field.name: field.type for field in both}
    del schema["expansion"], schema["d_latent"], config["d_model"], config["d_latent"], config["sites"]
    del config["expansion"]  # of a config that is open
    assert schema.pop("prefixes") == list[float] | None  # shares of the latents
    assert config.pop("prefixes") == tuple[int, ...] | None
    for name, given, number in (("dead_after_tokens", int, int), ("auxk_slope", int | float, float)):
        assert schema.pop(name) == given | str  # auto
        assert config.pop(name) is number
    assert schema == config


@pytest.mark.parametrize("option", yaml_options())
def test_every_option_is_a_config(option):
    stage_train.config.register()
    with initialize_config_module("conf", version_base="1.3"):
        values = compose("train", overrides=[f"sae={option}", "hydra.runtime.output_dir=out"]).sae
    config, learning = configs(OmegaConf.to_object(values), 64)
    assert config.d_latent == round(values.expansion * 64)
    assert config.k == values.k
    assert round_trip(config, learning) == (config, learning)


def configs(schema, width, run_tokens=None):
    """Of an SAE of one site."""
    return schema.to_configs(
        {"kind": "sae"}, Sites.of("layers.0.resid_post"), SiteWidths((width,), (width,)), run_tokens
    )


def schema(**overrides):
    fields = {**SAEConfig(d_model=1, d_latent=1, k=1).own_fields(), **LearningConfig().to_dict()}
    return SAESchema(**{"expansion": 2.5, **fields, "d_latent": None, **overrides})


def test_width_by_expansion_or_by_d_latent():
    assert configs(schema(), 4)[0].d_latent == 10
    assert configs(schema(d_latent=7), 4)[0].d_latent == 7
    with pytest.raises(GranaryError, match="expansion=0"):
        configs(schema(expansion=0), 4)


@pytest.mark.parametrize(
    ("run_tokens", "tokens"), [(2_000_000, 100_000), (200_000_000, 10_000_000), (400_000_000, 10_000_000), (5, 1)]
)
def test_dead_after_tokens_is_a_twentieth_of_a_short_run(run_tokens, tokens):
    assert configs(schema(dead_after_tokens="auto"), 4, run_tokens)[1].dead_after_tokens == tokens
    assert configs(schema(dead_after_tokens=70), 4, run_tokens)[1].dead_after_tokens == 70


def test_dead_after_tokens_is_a_number_or_auto():
    assert configs(schema(dead_after_tokens="auto"), 4)[1].dead_after_tokens == 10_000_000
    with pytest.raises(GranaryError, match="dead_after_tokens=soon: give a number of tokens, or auto"):
        configs(schema(dead_after_tokens="soon"), 4)
    with pytest.raises(GranaryError, match="dead_after_tokens=0: must be at least 1"):
        configs(schema(dead_after_tokens=0), 4)


@pytest.mark.parametrize(
    ("given", "num_latents", "slope"),
    [("auto", 4 * 63, 0.0), ("auto", 4 * 64, 0.3), (0.0, 4 * 64, 0.0), (0.5, 4, 0.5)],
)
def test_auxk_has_a_slope_in_wide_dictionaries(given, num_latents, slope):
    assert configs(schema(auxk_slope=given, d_latent=num_latents), 4)[1].auxk_slope == slope


def test_auxk_slope_is_a_number_or_auto():
    with pytest.raises(GranaryError, match=r"auxk_slope=wide: give a number, or auto for 0\.3 from 64 latents"):
        configs(schema(auxk_slope="wide"), 4)


def test_prefixes_are_shares_of_the_latents():
    assert configs(schema(prefixes=[0.25, 0.5, 1.0], d_latent=40), 4)[1].prefixes == (10, 20, 40)
    with pytest.raises(GranaryError, match=r"sae.prefixes=\[10.0\]: shares"):
        configs(schema(prefixes=[10.0]), 4)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "gated"])
def test_training_without_sparsity_is_refused_and_loading_is_not(activation):
    with pytest.raises(GranaryError, match="is not sparse without a penalty"):
        configs(schema(activation=activation, k=None), 4)
    check(SAEConfig(d_model=4, d_latent=8, activation=activation), LearningConfig())


RELU, JUMP = {"activation": "relu", "k": None}, {"activation": "jumprelu", "k": None}
GATED = {"activation": "gated", "k": None}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"k": None}, "sae.activation=topk needs sae.k"),
        ({"activation": "batchtopk", "k": None}, "sae.activation=batchtopk needs sae.k"),
        ({"activation": "relu"}, "sae.k=4 with sae.activation=relu: its sparsity comes from sae.penalty_weight"),
        ({"penalty": "l1", "penalty_weight": 1.0}, "k fixes how many latents fire"),
        ({"penalty_weight": 1.0}, "sae.penalty_weight=1.0 with sae.penalty=none"),
        ({**RELU, "penalty": "l0"}, "choose from l1, tanh, tanh_quad; l0 needs jumprelu"),
        ({**JUMP, "penalty": "l1"}, "choose from l0, tanh, tanh_quad; jumprelu exists to avoid the shrinkage"),
        ({**GATED, "penalty": "tanh"}, "sae.penalty=tanh with sae.activation=gated: choose from l1"),
        ({**GATED, "multi_topk_weight": 0.1}, "there is no k to take a multiple of"),
        ({"preact_weight": 1.0}, "only jumprelu has thresholds"),
        ({**RELU, "prefixes": (8, 64)}, "Matryoshka groups are for topk and batchtopk"),
        ({"prefixes": (8, 32)}, "the last of them d_latent=64"),
        ({"prefixes": (32, 8, 64)}, "ascending"),
        ({"prefixes": (0, 64)}, "ascending"),
        ({"prefixes": ()}, "ascending"),
        ({"prefixes": (8, 64), "multi_topk_weight": 0.1}, "use one of them"),
        ({"shift_back": False}, "shift_back=false is for normalisation=layer_norm alone"),
        ({"encoder_init": "norm_search"}, "unit_norm_decoder=true fixes at 1"),
        ({"init_subspace": 9}, "more than the 8 dimensions"),
        ({"init_subspace": 0}, "sae.init_subspace=0"),
        ({"threshold_decay": 1.0}, "sae.threshold_decay=1.0"),
        ({**JUMP, "bandwidth": 0.0}, "sae.bandwidth=0.0: must be a positive number"),
        ({**JUMP, "threshold_init": 0.0}, "sae.threshold_init=0.0: must be a positive number"),
        ({"penalty": "l2"}, "choose from none, l0, l1, tanh, tanh_quad"),
        ({"encoder_init": "random"}, "choose from scaled, transpose, norm_search"),
    ],
)
def test_bad_combinations_are_refused_with_the_reason(fields, reason):
    with pytest.raises(GranaryError) as caught:
        check(*split_fields({"d_model": 8, "d_latent": 64, "k": 4, **fields}))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
