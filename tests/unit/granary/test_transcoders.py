"""``granary transcoders``: which layers it takes, and what it makes of its arguments."""

import pytest

from granary.transcoders import chosen_layers, commands, layers_of
from shared.basics.errors import GranaryError


def test_f48_layers_in_the_order_of_their_numbers() -> None:
    hooks = [f"layers.{layer}.{site}" for layer in (0, 1, 10, 2, 9) for site in ("mlp_out", "mlp_in")]
    assert layers_of([*hooks, "layers.3.mlp_in", "model.layers.4.mlp_in", "layers.5.resid_post"]) == [0, 1, 2, 9, 10]
    assert chosen_layers(["layer=10,9,2"]) == [2, 9, 10]
    with pytest.raises(GranaryError, match=r"layer=0-3: numbers of layers, such as layer=0,3"):
        chosen_layers(["layer=0-3"])


def test_training_and_scoring_are_told_the_same() -> None:
    train, evaluate = commands(["-m", "name=x", "sae.k=16", "contexts=8", "layer=9,10"], [9, 10])
    assert train == [
        "-m",
        "packed=true",
        "variant=transcoder",
        "at_layer=9,10",
        "reads='layers.${at_layer}.mlp_in'",
        "writes='layers.${at_layer}.mlp_out'",
        "hydra.sweep.dir='${run_dir}/transcoders'",
        "hydra.sweep.subdir='layer_${at_layer}'",
        "name=x",
        "sae.k=16",
    ]
    assert evaluate == [
        "name=x",
        "contexts=8",
        "sae.path='${run_dir}/transcoders'",
        "sae.last_grid=true",
        "out_dir='${run_dir}/transcoders'",
        "joint=true",
        "sae.per_pass=2",
    ]


def test_another_kind_and_a_single_layer() -> None:
    train, evaluate = commands(["variant=skip_transcoder", "set=skip"], [3])
    assert "hydra.sweep.dir='${run_dir}/skip'" in train
    assert "sae.path='${run_dir}/skip'" in evaluate
    assert "variant=skip_transcoder" in train
    assert "variant=transcoder" not in train
    assert "joint=false" in evaluate
