"""Every command in README.md and docs/ runs, in a folder with a small study of the bundled model."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from shared.sae import Transcoder
from shared.sae.loading import convert
from shared.sae.sites import Sites
from shared.sae.variants.transcoder import TranscoderConfig
from shared.store import Store
from tests.cli import ForkServer
from tests.documented import NOT_RUN, Block, blocks, calls
from tests.foreign import write_dictionary_learning
from tests.foreign_transcoders import write_gemma_scope

BLOCKS = [block for block in blocks() if block.runnable]
# Blocks all of whose commands hold one of these take little time.
FAST = (
    "granary store",
    "granary convert",
    "granary push",
    "examples/steer.py",
    "granary export",
    "granary trace weights",
)
TRAIN = ("stage_train", "debug=tiny_train", "name=demo", "schedule.tokens=2_000")
TEXT = "def read(self, path):\n    return path.read_text()\n"


def is_fast(block: Block) -> bool:
    return all(any(part in command for part in FAST) for command in block.runnable)


@pytest.fixture(scope="module")
def study(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands presuppose: texts, stores, a trained SAE, a folder of another project."""
    folder = tmp_path_factory.mktemp("study")
    here = stages.at(folder)
    for arguments in (
        ["stage_harvest", "debug=tiny_harvest", "name=demo", "corpus.contexts=64"],
        ["stage_harvest", "debug=tiny_harvest", "name=llama31", "hooks.layers=[1,2]"],
        ["stage_harvest", "debug=tiny_harvest", "name=mlps", "hooks.layers=[0,1,2]", "hooks.sites=[mlp_in,mlp_out]"],
        TRAIN,
        ["stage_inspect", "name=demo", "contexts=2"],
    ):
        done = here.run(*arguments)
        assert done.code == 0, done.stderr
    shutil.copytree(folder / "runs/demo", folder / "runs/mine")
    for name in ("base", "chat", "mixed"):  # of crosscoders, which read two sites
        shutil.copytree(folder / "runs/llama31", folder / "runs" / name)
    shutil.copytree(folder / "runs/demo/sae", folder / "runs/llama31/sae")
    shutil.copytree(folder / "runs/demo/sae", folder / "runs/other")
    convert(folder / "runs/demo/sae", folder / "downloaded", "saelens")
    shutil.copytree(folder / "downloaded", folder / "odd")
    odd = folder / "odd" / "cfg.json"
    odd.write_text(json.dumps(json.loads(odd.read_text()) | {"mean_subtracted": True}))
    write_gemma_scope(folder / "copied", 1)
    write_dictionary_learning(folder / "theirs", "BatchTopKSAE")
    (folder / "theirs" / "ae.pt").rename(folder / "moved.pt")
    plain = {"W_enc": torch.randn(48, 16), "b_enc": torch.zeros(48), "W_dec": torch.randn(48, 16)}
    torch.save({**plain, "b_dec": torch.zeros(16)}, folder / "sae.pt")
    model = Store.open(folder / "runs/mlps/store").plan.provenance["model"]
    for layer in (0, 1, 2):
        sites = Sites((f"layers.{layer}.mlp_in",), (f"layers.{layer}.mlp_out",))
        config = TranscoderConfig(d_in=128, d_out=128, d_latent=256, k=4, pre_bias=False, sites=sites)
        Transcoder(config).save_pretrained(folder / "set" / sites.writes[0], {"model": model})
    (folder / "data").mkdir()
    (folder / "data" / "a.txt").write_text("<|endoftext|>".join([TEXT * 20] * 40))
    return folder


@pytest.fixture(scope="module")
def swept(study: Path, stages: ForkServer) -> Path:
    """With a sweep beside the trained SAE, which fast commands do not need."""
    done = stages.at(study).run(*TRAIN, "-m", "sae.k=4,8", "packed=true")
    assert done.code == 0, done.stderr
    shutil.copytree(study / "runs/demo/sweep", study / "runs/mine/sweep")
    return study


def what_it_begins_with(study: Path, first: str, work: Path) -> None:
    """Copy the study to `work`, without what commands that begin with `first` are there to make."""
    makes = shlex.split(first, comments=True)[1]
    left_out = {"demo": ["runs"], "harvest": ["runs"], "train": ["sae", "sweep"], "sweep": ["sae", "sweep"]}.get(
        makes, []
    )
    if "corpus=store" in first:  # a store that is there already is what it reads
        left_out = ["chat"]
    shutil.copytree(study, work, ignore=shutil.ignore_patterns(*left_out))
    if ("transcoder" in first or "mlp_in" in first) and makes != "harvest":
        for name in ("demo", "mine"):
            shutil.rmtree(work / "runs" / name)
            shutil.copytree(work / "runs/mlps", work / "runs" / name)
    if "trace weights" in first:
        shutil.copytree(work / "runs/mlps", work / "runs/code")
        shutil.copytree(work / "set", work / "runs/code/transcoders")
    if makes == "convert" and "runs/mine/transcoders" in first:
        shutil.copytree(work / "set", work / "runs/mine/transcoders")


def test_what_is_not_run_is_there_and_needs_what_it_says() -> None:
    every = [command for block in blocks() for command in block.commands]
    assert len(every) >= 30
    for part in NOT_RUN:
        assert any(part in command for command in every), f"no page has a command with {part!r} any more"


@pytest.mark.parametrize(
    "block", [pytest.param(one, id=str(one), marks=[] if is_fast(one) else pytest.mark.slow) for one in BLOCKS]
)
def test_documented(
    block: Block, study: Path, stages: ForkServer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not is_fast(block):
        request.getfixturevalue("swept")
    work = tmp_path / "work"
    what_it_begins_with(study, block.runnable[0], work)
    here = stages.at(work)
    for command in block.runnable:
        for module, arguments in calls(command):
            done = here.run(module, *arguments)
            assert done.code == 0, f"{command}\n{module} {arguments}\n{done.stderr[-3000:]}"
