"""Every config of the tree composes, fills its schema, and refuses a key it does not know."""

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import stage_eval.config
import stage_harvest.config
import stage_inspect.config
import stage_trace.config
import stage_train.config
from shared.launch.config_errors import describe_config_error
from shared.launch.overrides import expand_shorthands
from tests.composing import composed, remember

CONF = Path(__file__).resolve().parents[3] / "conf"
STAGES = ("harvest", "train", "eval", "inspect", "trace")
GLOBAL_GROUPS = ("experiment", "debug")


def groups_of(stage: str) -> list[str]:
    """Groups that the stage's defaults list names."""
    defaults = OmegaConf.load(CONF / f"{stage}.yaml").defaults
    entries = [next(iter(entry)) for entry in defaults if not isinstance(entry, str)]
    return [str(entry).split()[-1] for entry in entries if not str(entry).startswith("override")]


def options() -> list[tuple[str, str, str]]:
    found = []
    for stage in STAGES:
        for group in groups_of(stage):
            found += [(stage, group, path.stem) for path in sorted((CONF / group).glob("*.yaml"))]
    return found


def belongs(stage: str, group: str, name: str) -> bool:
    """An overlay names the stage it is for in its header: ``# @package _global_`` then ``# stages: train``."""
    if group not in GLOBAL_GROUPS:
        return True
    header = (CONF / group / f"{name}.yaml").read_text().split("\n", 3)[:3]
    stages = [line.removeprefix("# stages:").split() for line in header if line.startswith("# stages:")]
    assert stages, f"conf/{group}/{name}.yaml lacks its '# stages:' line"
    return stage in stages[0]


@pytest.fixture(autouse=True, scope="module")
def _hydra() -> Iterator[None]:
    stage_harvest.config.register()
    stage_train.config.register()
    stage_eval.config.register()
    stage_inspect.config.register()
    stage_trace.config.register()
    with initialize_config_module("conf", version_base="1.3"):
        yield


def fill(stage: str, *overrides: str) -> Any:
    cfg = compose(stage, overrides=["hydra.runtime.output_dir=out", *overrides], return_hydra_config=True)
    OmegaConf.set_struct(cfg, False)
    hydra_node = cfg.pop("hydra")
    OmegaConf.register_new_resolver("hydra", lambda key: OmegaConf.select(hydra_node, key), replace=True)
    try:
        return OmegaConf.to_object(cfg)
    finally:
        OmegaConf.clear_resolver("hydra")


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_fill_the_schema(stage: str) -> None:
    assert fill(stage).name == "demo"


OPTIONS = [option for option in options() if belongs(*option)]


def together(stage: str) -> list[list[str]]:
    """All options of a stage in as few command lines as can hold them: the first of each group, the second, ..."""
    names: dict[str, list[str]] = {}
    for of, group, name in OPTIONS:
        if of == stage:
            names.setdefault(group, []).append(name)
    lines = zip_longest(*([f"{group}={name}" for name in known] for group, known in names.items()))
    return [[one for one in line if one is not None] for line in lines]


@pytest.mark.parametrize("stage", STAGES)
def test_all_options_compose(stage: str) -> None:
    lines = together(stage)
    assert sum(map(len, lines)) == sum(of == stage for of, _, _ in OPTIONS)
    for line in lines:
        compose(stage, overrides=line)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "group", "name"), OPTIONS)
def test_every_option_composes_alone(stage: str, group: str, name: str) -> None:
    compose(stage, overrides=[f"{group}={name}"])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["seed=3", "sae=gated", "optim=muon", "optim.lr=1e-2", "sae.k=null", "store.others=[{url:a,weight:0.5}]"],
        ["variant=molt", "sae=batchtopk", "sae.k=4"],
        ["sae=batchtopk", "variant=clt", "variant=sae", "schedule=cosine", "optim=signum", "parallel=latent"],
        ["variant=crosscoder", "sae=topp"],
        ["variant=molt", 'variant.ranks="{4:2}"', "+variant.more=1", "name='a b'", "parallel=fsdp"],
        ["variant=transcoder", "hook=null", "reads=[a,b]", "~variant.pre_bias", "schedule.tokens=null"],
    ],
)
def test_tests_compose_as_hydra_does(overrides: list[str]) -> None:
    try:
        remember(False)
        expected = compose("train", overrides=overrides)
    except HydraException as error:
        remember()
        for made in (composed, compose):
            with pytest.raises(type(error), match=re.escape(str(error).splitlines()[0])):
                made("train", overrides)
        return
    finally:
        remember()
    for made in (composed, compose):
        for _ in range(2):  # the second is of groups that were composed before
            found = made("train", overrides)
            assert OmegaConf.to_container(found) == OmegaConf.to_container(expected)
            assert OmegaConf.is_struct(found)
            found.seed = -1  # which no later one sees


WHOLE_NUMBER = {"harvest": "seed", "train": "seed", "eval": "seed", "inspect": "seed", "trace": "batch"}


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_key_is_named(stage: str) -> None:
    known = WHOLE_NUMBER[stage]
    mistyped = known.replace("e", "", 1) if "e" in known else known[:-1]
    with pytest.raises((HydraException, OmegaConfBaseException)) as caught:
        compose(stage, overrides=[f"{mistyped}=3"])
    line = describe_config_error(caught.value)
    assert line == f"unknown configuration key {mistyped!r} (did you mean {known!r}?)"


@pytest.mark.parametrize("stage", STAGES)
def test_a_wrong_type_is_named(stage: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException)) as caught:
        compose(stage, overrides=[f"{WHOLE_NUMBER[stage]}=early"])
    line = describe_config_error(caught.value)
    assert WHOLE_NUMBER[stage] in line
    assert "early" in line
    assert "\n" not in line


def test_an_unknown_option_lists_the_known() -> None:
    with pytest.raises((HydraException, OmegaConfBaseException)) as caught:
        compose("train", overrides=["sae=topp"])
    assert "no option 'topp' in group 'sae': choose from" in describe_config_error(caught.value)


def test_a_model_may_be_a_path_or_a_group_option() -> None:
    assert expand_shorthands(["model=bundled", "seed=1"]) == ["model=bundled", "seed=1"]
    assert expand_shorthands(["model=meta-llama/Llama-3.2-1B"]) == ["model.path=meta-llama/Llama-3.2-1B"]
    assert expand_shorthands(["model=/data/llama", "model.dtype=float16"]) == [
        "model.path=/data/llama",
        "model.dtype=float16",
    ]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["sae.k=16", "sae.expansion=8"], "expansion=8,k=16"),
        ([], "run"),
        (["sae.prefixes=[0.25,0.5,1.0]", "sae.k=16"], "k=16,prefixes=0.25+0.5+1.0"),
        (["sae.prefixes=[0.25,0]"], "prefixes=0.25+0"),
        (["writes=[layers.2.mlp_out,layers.3.mlp_out]", "reads=layers.2.mlp_in"],
         "reads=layers.2.mlp_in,writes=layers.2.mlp_out+layers.3.mlp_out"),
        (["init_from=/a/b"], "init_from=662b7b62"),
        (["init_from='/a/b'"], "init_from=662b7b62"),
        (["reads=layers.*.mlp_in"], "reads=06c92ec0"),
        (["optim.lr=1e-4", "sae=topk", "init_from=null"], "init_from=null,lr=1e-4,sae=topk"),
        (["stream.seed=1", "seed=2"], "seed=2,stream.seed=1"),
        (["checkpoint.every=1"], "every=1"),  # no part of what fixes the result
        (["name=mine", "sae.k=16"], "k=16"),
        (["run_dir='a,b=[c'", "sae.k=16"], "k=16"),
        ([f"hook=layers.{'9' * 300}.resid_post"], "90e6d47e"),
    ],
)  # fmt: skip
def test_the_folder_of_a_run_of_a_sweep(overrides: list[str], name: str) -> None:
    assert stage_train.config.sweep_name(overrides, stage_train.config.unnamed_keys()) == name


def test_values_that_are_not_alike_have_folders_of_their_own() -> None:
    values = [
        "[[1,2],[3]]",
        "[[1],[2,3]]",
        "[a,b]",
        "[a+b]",
        "['a,b']",
        "[{url:a},{url:b}]",
        "[{url:ab}]",
        "'a b'",
        "ab",
    ]
    assert len({stage_train.config.sweep_name([f"reads={value}"], []) for value in values}) == len(values)
