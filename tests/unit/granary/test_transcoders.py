"""``granary transcoders``: which layers it takes, and what it makes of its arguments."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from granary.transcoders import check_same_set, chosen_layers, commands, layers_of
from shared.basics.display import masked
from shared.basics.errors import GranaryError
from shared.launch.stage import spelt_out
from stage_train.config import TrainSchema


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
        "sae.path=['${run_dir}/transcoders/layer_9','${run_dir}/transcoders/layer_10']",
        "out_dir='${run_dir}/transcoders'",
        "joint=true",
        "sae.per_pass=2",
    ]


def test_another_kind_and_a_single_layer() -> None:
    train, evaluate = commands(["variant=skip_transcoder", "set=skip"], [3])
    assert "hydra.sweep.dir='${run_dir}/skip'" in train
    assert "sae.path=['${run_dir}/skip/layer_3']" in evaluate
    assert "variant=skip_transcoder" in train
    assert "variant=transcoder" not in train
    assert "joint=false" in evaluate


def test_a_folder_is_of_one_set(tmp_path: Path) -> None:
    """Other layers, processes or spellings are the same set; other settings are not. The record is Hydra's."""
    url = "store.url='s3://bucket/store?X-Amz-Signature=f00d'"
    train, _ = commands(["name=x", "sae.k=16", "schedule.tokens=2_000", url], [0, 1])
    check_same_set(tmp_path, train)
    task = [masked(word) for word in spelt_out(train, TrainSchema) if not word.startswith(("-m", "hydra."))]
    assert "schedule.tokens=2000" in task
    OmegaConf.save(OmegaConf.create({"hydra": {"overrides": {"task": task}}}), tmp_path / "multirun.yaml")
    check_same_set(tmp_path, commands(["name=x", "sae.k=16", "nproc=2", "schedule.tokens=2e3", url], [2])[0])
    with pytest.raises(GranaryError, match=r"other settings \(sae\.k=16, sae\.k=32\): name this one by set=NAME"):
        check_same_set(tmp_path, commands(["name=x", "sae.k=32", "schedule.tokens=2000", url], [0, 1])[0])
    (tmp_path / "multirun.yaml").write_text("hydra:\n  over")  # as a full disk leaves it
    check_same_set(tmp_path, train)
