"""What the command line may say beyond Hydra's grammar, and what it is told when it says something else."""

import re

import pytest
from hydra import compose
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

import stage_eval.config
import stage_harvest.config
import stage_inspect.config
from shared.basics.config import marks
from shared.basics.errors import GranaryError
from shared.basics.numbers import parse_count
from shared.launch.config_errors import describe_config_error
from shared.launch.counts import expand_counts
from shared.launch.overrides import expand_launcher, expand_shorthands, name_swept_keys, quote_text
from shared.launch.peer_names import KEYS, SITES, site_of
from shared.launch.schema import fill, schema_of, suggestion, unknown_keys
from shared.lm.hookpoint import SITES as OUR_SITES
from stage_eval.config import EvalSchema
from stage_harvest.config import HarvestSchema
from stage_train.config import TrainSchema, unnamed_keys


@pytest.fixture(autouse=True, scope="module")
def _all_stages(train_configs: None) -> None:
    stage_harvest.config.register()
    stage_eval.config.register()
    stage_inspect.config.register()


@pytest.mark.parametrize(
    ("text", "number"),
    [("50M", 50_000_000), ("1e6", 10**6), ("2_000_000", 2_000_000), ("1.5k", 1500), ("20B", 2 * 10**10), ("7", 7)],
)
def test_a_number_as_people_write_it(text: str, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["50X", "1.5", "M", "", "-3", "1e-2", "0x10", "1.0001k"])
def test_what_is_no_whole_number_says_how_one_is_written(text: str) -> None:
    with pytest.raises(GranaryError, match=f"{re.escape(text)} is no whole number: write it as 50000000, .* or 50M"):
        parse_count(text)


def test_counts_are_expanded_where_a_key_counts_and_nowhere_else() -> None:
    given = ["schedule.tokens=1M,2e6", "sae.d_latent=null", "sae.dead_after_tokens=auto", "name=50M", "optim.lr=1e-3"]
    expected = ["schedule.tokens=1000000,2000000", *given[1:]]
    assert expand_counts(given, TrainSchema) == expected
    assert expand_counts(["packing.seq_len=4k", "corpus.contexts=1e5", "-m"], HarvestSchema) == [
        "packing.seq_len=4000",
        "corpus.contexts=100000",
        "-m",
    ]
    with pytest.raises(GranaryError, match=r"^schedule\.tokens=1\.5 is no whole number"):
        expand_counts(["schedule.tokens=1.5"], TrainSchema)


def test_groups_take_the_value_of_their_key() -> None:
    assert expand_shorthands(["device=cpu", "device=auto"]) == ["device.name=cpu", "device=auto"]


@pytest.mark.parametrize(
    ("given", "value"),
    [("<|endoftext|>", "<|endoftext|>"), ("a|b", "a|b"), ('he said "x|"', 'he said "x|"'), ("a|b\\", "a|b\\")],
)
def test_text_that_hydra_can_not_read_is_taken_as_it_is(given: str, value: str) -> None:
    overrides = quote_text(["corpus=text", "corpus.files=a", f"corpus.separator={given}", "-m", "hooks.layers=[1,2]"])
    assert overrides[3:] == ["-m", "hooks.layers=[1,2]"]
    assert compose("harvest", overrides=[*overrides[:3], overrides[4]]).corpus.separator == value


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sae=[a/k=2,b]", "no option '[a/k=2,b]' in group 'sae': choose from batchtopk, "),
        ("sae=", "no option '' in group 'sae': choose from batchtopk, "),
        ("sae=a/b", "no option 'a/b' in group 'sae': choose from batchtopk, "),
        ("schedule.tokens=<|5|>", "schedule.tokens: Value '<|5|>' of type 'str' could not be converted to Integer"),
    ],
)
def test_what_is_no_value_names_its_key(override: str, line: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException)) as caught:
        compose("train", overrides=quote_text([override]))
    assert describe_config_error(caught.value).startswith(line)


@pytest.mark.parametrize("stage", ["harvest", "train", "eval", "inspect"])
@pytest.mark.parametrize("key", ["nosuchkey", "device.nosuchkey"])
def test_a_key_put_in_by_force_is_unknown_all_the_same(stage: str, key: str) -> None:
    for plus in ("+", "++"):
        cfg = compose(stage, overrides=[f"{plus}{key}=1"])
        assert [name for name, _ in unknown_keys(cfg)] == [key]
        with pytest.raises(GranaryError, match=f"unknown configuration key '{key}'"):
            fill(cfg)


def test_open_groups_take_any_key() -> None:
    overrides = ["corpus=mixture", "corpus.parts={web: {kind: jsonl, files: a, anything: 1}}"]
    assert not list(unknown_keys(compose("harvest", overrides=overrides)))
    assert not list(unknown_keys(compose("train", overrides=["+variant.anything=1"])))


@pytest.mark.parametrize(
    ("schema", "key", "text"),
    [
        (TrainSchema, "k", " (did you mean 'sae.k'?)"),
        (TrainSchema, "lr", " (did you mean 'optim.lr'?)"),
        (TrainSchema, "d_sae", " (did you mean 'sae.d_latent'?)"),
        (TrainSchema, "hook_name", " (did you mean 'hook'?)"),
        (TrainSchema, "sed", " (did you mean 'seed'?)"),
        (HarvestSchema, "context_size", " (did you mean 'packing.seq_len'?)"),
        (HarvestSchema, "dtype", " (did you mean 'model.dtype' or 'store.dtype'?)"),
    ],
)
def test_the_peers_names_lead_to_ours(schema: type, key: str, text: str) -> None:
    assert suggestion(key, schema) == text


def test_a_key_of_a_group_is_suggested_with_the_group() -> None:
    node = schema_of("train").__dataclass_fields__["sae"].type
    assert suggestion("sae.expansoin", node) == " (did you mean 'sae.expansion'?)"
    assert suggestion("zzz", EvalSchema).startswith(": choose from batch_contexts, contexts, device")


def test_every_key_of_ours_that_is_suggested_exists() -> None:
    ours = {name for schema in (TrainSchema, HarvestSchema, EvalSchema) for name, _ in marks(schema)}
    ours |= {f"corpus.{name}" for kind in stage_harvest.config.SOURCE_KINDS.values() for name, _ in marks(kind)}
    assert set(KEYS.values()) <= ours
    assert not set(KEYS) & ours


def test_sites_as_others_name_them() -> None:
    assert set(SITES.values()) <= set(OUR_SITES)
    assert site_of("blocks.2.hook_resid_post") == "layers.2.resid_post"
    assert site_of("model.layers.7.mlp") == "layers.7.mlp_out"
    assert site_of("layers.3") == "layers.3.resid_post"
    assert site_of("blocks.2.hook_nothing") is None
    assert site_of("vision.2") is None


@pytest.mark.parametrize("given", [["-m", "a=1,2", "b=3"], ["a=1,2", "--multirun", "b=3"], ["a=1,2", "b=3", "-m"]])
def test_a_multirun_is_asked_for_anywhere_on_the_line(given: list[str]) -> None:
    assert expand_launcher(given) == ["--multirun", "a=1,2", "b=3"]


def test_a_key_that_a_sweep_varies_is_in_its_folders_names() -> None:
    line = ["--multirun", "store.url=a,b", "device.name=cpu", "run_dir=x,y", "sae.k=2,3"]
    *given, added = name_swept_keys(line, TrainSchema)
    assert given == line
    key, _, left = added.partition("=")
    assert key == "hydra.job.config.override_dirname.exclude_keys"
    assert set(left.strip("[]").split(",")) == set(unnamed_keys()) - {"store.url"}
    for alone in (line[1:], ["--multirun", "store.url=a", "sae.k=2,3"], [*line, added]):
        assert name_swept_keys(alone, TrainSchema) == alone
