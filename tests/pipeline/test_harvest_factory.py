"""Harvests of a function's model by the command line: killed and run again, on two processes, through all stages."""

import json
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import granary
from shared.basics.config import ModelInput
from shared.basics.errors import GranaryError
from shared.lm.recorded import choose_model, factory_of
from shared.store import Store
from stage_harvest.tokens.stored import StoredTokens
from tests.cli import REPOSITORY, ForkServer, Result
from tests.harvesting import same_files
from tests.pipeline.test_window import training

SOURCE = """
import os, time
from pathlib import Path

import torch
from torch import nn

Path("imported").touch()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return self.fc(self.conv(x).relu().mean((-2, -1)))


def make(changed=0.0):
    torch.manual_seed(0)

    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(24):
            yield torch.randn(3, 3, 4, 4, generator=generator) + changed

    return Net(), batches


def changed():
    return make(1.0)
"""
PLAIN = {
    "model.factory": "my_net:make", "corpus": "batches", "hooks.modules": "conv", "packing.seq_len": 32,
    "store.shard_contexts": 4, "store.dtype": "float32", "store.heldout_fraction": 0.2, "device.threads": 1,
}  # fmt: skip


class Factories:
    """A folder with the source of a model, and the stages over it."""

    def __init__(self, root: Path, server: ForkServer) -> None:
        self.root, self.server = root, server
        (root / "my_net.py").write_text(SOURCE)

    def arguments(self, store: str, **changes: object) -> list[str]:
        keys = PLAIN | {"run_dir": self.root / f"{store}-run", "store.url": self.root / store}
        keys |= {key.replace("__", "."): value for key, value in changes.items()}
        return [f"{key}={value}" for key, value in keys.items() if value is not None]

    def run(self, store: str, **changes: object) -> Result:
        return self.server.run("stage_harvest", *self.arguments(store, **changes))

    def harvest(self, store: str, **changes: object) -> Store:
        result = self.run(store, **changes)
        assert result.code == 0, result.stderr
        return Store.open(self.root / store)


@pytest.fixture(scope="module")
def factories(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Factories:
    root = tmp_path_factory.mktemp("factories")
    made = Factories(root, stages.at(root))
    made.harvest("whole")
    return made


def test_a_store_of_a_convolution_holds_its_channels(factories: Factories) -> None:
    store = Store.open(factories.root / "whole")
    namespace: dict[str, object] = {"__name__": "plain"}
    exec(SOURCE.replace('Path("imported").touch()', ""), namespace)  # the test's own text
    model, batches = namespace["make"]()  # type: ignore[operator]
    with torch.no_grad():
        rows = torch.cat([model.conv(x).movedim(1, -1).reshape(-1, 8) for x in batches(0)])
    found = torch.cat([store.read_context("conv", context) for context in range(store.num_contexts)])
    assert torch.equal(found, rows)
    assert store.num_contexts == 24 * 3 * 16 // 32
    assert store.tokens([0])[0].tolist() == [*range(16), *range(16)]
    assert store.segments([1])[0].tolist() == [0] * 16 + [1] * 16
    assert store.plan.provenance["model"]["factory"] == factory_of(store) == "my_net:make"


def test_killed_and_run_again_gives_the_same_bytes(factories: Factories) -> None:
    arguments, manifest = factories.arguments("killed"), factories.root / "killed" / "manifest"
    process = factories.server.start("stage_harvest", *arguments, variables={"SLOW": "0.05"})
    while process.poll() is None and len(list(manifest.glob("*.json"))) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(Store.open(factories.root / "killed").committed()) < 9
    for changes, told in (
        ({"model__factory": "my_net:changed"}, "provenance.corpus.fingerprint is"),
        ({"seed": 1}, "provenance.corpus.seed is 0, not 1"),
    ):
        refused = factories.run("killed", **changes)
        assert (refused.code, told in refused.stderr.splitlines()[-1]) == (2, True)
    again = factories.run("killed")
    assert again.code == 0, again.stderr
    assert "resuming" in again.stderr
    assert same_files(factories.root / "whole", factories.root / "killed") > 9


@pytest.mark.slow
def test_the_page_runs(stages: ForkServer, tmp_path: Path) -> None:
    """docs/harvest_modules.md: its function and its commands, as they stand there."""
    text = (REPOSITORY / "docs/harvest_modules.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_net.py").write_text(source)
    commands = [line.split() for line in text.splitlines() if line.startswith("    granary ")]
    assert [command[1] for command in commands] == ["harvest", "train", "eval", "inspect"]
    for _, *arguments in commands:
        done = stages.at(tmp_path).run("granary", *arguments)
        assert done.code == 0, done.stderr
    assert json.loads((tmp_path / "runs/net/eval.json").read_text())["reconstruction"]["fvu"] < 0.5
    store = Store.open(tmp_path / "runs/net/store")
    starts = sum(int(((store.tokens([c]) == 0) & (store.segments([c]) >= 0)).sum()) for c in range(store.num_contexts))
    assert starts == 3200


@pytest.mark.slow
def test_two_processes_make_the_store_of_one(factories: Factories) -> None:
    factories.harvest("two", nproc=2)
    assert same_files(factories.root / "whole", factories.root / "two") > 9


def test_what_does_not_go_is_one_line(factories: Factories) -> None:
    for changes, told in (
        ({"corpus": "stdlib"}, "model.factory brings its own batches: say corpus=batches"),
        ({"hooks__modules": None}, "so hooks.modules says what is kept"),
        ({"model__path": "bundled"}, "model.path does not go with model.factory"),
    ):
        assert told in factories.run("wrong", **changes).error
    short = factories.run("wrong", corpus__contexts=99)
    assert "fill 36 contexts of packing.seq_len=32: 99 were asked for" in short.stderr.splitlines()[-1]
    assert not (factories.root / "wrong").exists()


def test_what_a_store_names_is_no_model_to_load(factories: Factories) -> None:
    store = Store.open(factories.root / "whole")
    (factories.root / "imported").unlink(missing_ok=True)
    nothing = ModelInput(path=None, revision=None, dtype=None, allow_other=True)
    with pytest.raises(GranaryError, match="of a model that my_net:make made, not of a language model"):
        choose_model(nothing, store)
    with pytest.raises(GranaryError, match="a store of a model that my_net:make made, not of a decoder"):
        StoredTokens(store)
    assert not (factories.root / "imported").exists()
    assert "my_net" not in sys.modules


@pytest.mark.slow
def test_what_a_store_names_is_told_and_never_run(factories: Factories) -> None:
    """The later stages go through a store, run and SAE folder that name a function, without its module."""
    root = factories.root / "whole-run"
    (factories.root / "imported").unlink(missing_ok=True)
    run = factories.server.run
    trained = run("stage_train", *training(root / "sae", factories.root / "whole"), "hook=conv")
    assert trained.code == 0, trained.stderr
    here = [f"run_dir={root}", f"store.url={factories.root / 'whole'}", "device.threads=1"]
    scored = run("stage_eval", *here)
    assert scored.code == 0, scored.stderr
    assert "no loss with the reconstruction spliced in: the store is of a model that my_net:make made" in scored.stderr
    evaluation = json.loads((root / "eval.json").read_text())
    assert evaluation["downstream"] is None
    assert 0 < evaluation["reconstruction"]["fvu"] < 1
    inspected = run("stage_inspect", *here)
    assert inspected.code == 0, inspected.stderr
    assert "no logits: the store is of a model that my_net:make made" in inspected.stderr
    latents = granary.Latents.open(root / "latents")
    assert latents.meta.model["factory"] == "my_net:make"
    latent = int(np.argmax([len(latents.top(number, 1)) for number in range(latents.num_latents)]))
    (strongest,) = latents.top(latent, 1)
    store = Store.open(factories.root / "whole")
    sae = granary.SAE.from_pretrained(root / "sae")
    dense = sae.encode(store.read_context("conv", strongest.context).float()).to_dense(sae.config.d_latent)
    assert np.isclose(float(dense[strongest.position, latent].detach()), strongest.value, rtol=1e-4)
    assert strongest.tokens[strongest.peak] == strongest.position % 16  # the row's number in its image
    told = run("stage_harvest", f"run_dir={root}", "corpus=store", f"corpus.path={factories.root / 'whole'}").error
    assert "is a store of a model that my_net:make made, not of a decoder's tokens" in told
    told = run("shared.store", "info", str(factories.root / "whole"))
    assert (told.code, "my_net:make" in told.stdout) == (0, True)
    told = run("stage_eval", *here, "supervised=true")
    assert (told.code, "is of a model that my_net:make made" in told.stderr.splitlines()[-1]) == (2, True)
    assert not (factories.root / "imported").exists()
