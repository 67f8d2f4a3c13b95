"""What version 1 wrote still reads: stores, SAE folders, and a training run that was under way (``tests/fixtures/v1``).

Through the public face alone: ``shared.store.Store``, ``shared.sae.SAE`` and the command lines.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.sae import SAE
from shared.store import Store
from tests.cli import ForkServer

OLD = Path(__file__).resolve().parents[1] / "fixtures/v1"
SAES = sorted(path.name for path in (OLD / "saes").iterdir())
# Another processor's matrix products add in another order: a few units in the last place of float32.
ROUNDING = {"rtol": 2e-6, "atol": 2e-6}
# The command of README.md but for its places.
RUN = (
    "hook=layers.1.resid_post sae.d_latent=32 sae.dead_after_tokens=32 stream.batch_size=16 stream.lanes=2 "
    "stream.mix_contexts=2 schedule.tokens=480 device.threads=1 logger.curves=false sae.k=4 checkpoint.every=0.5 "
    "checkpoint.keep=3 logger.every=1"
)


@pytest.fixture(scope="module")
def server(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> ForkServer:
    """The stages in a folder of their own."""
    return stages.at(tmp_path_factory.mktemp("old"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- stores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["store", "store-int8"])
def test_a_store_verifies(server: ForkServer, name: str) -> None:
    result = server.run("shared.store", "verify", str(OLD / name))
    assert result.code == 0, result.stdout + result.stderr
    assert "0 damaged, 0 of 4 shards missing" in " ".join(result.stdout.split())


@pytest.mark.parametrize("name", ["store", "store-int8"])
def test_a_store_reads_bit_for_bit(name: str) -> None:
    store, expected = Store.open(OLD / name), load_file(OLD / f"{name}.expected.safetensors")
    contexts = range(store.num_contexts)
    assert (store.num_contexts, store.seq_len, sorted(store.heldout_shards)) == (8, 24, [2])
    assert store.complete
    for part in ("tokens", "mask", "segments"):
        found = torch.from_numpy(getattr(store, part)(contexts))
        assert found.dtype == expected[part].dtype
        assert torch.equal(found, expected.pop(part))
    assert list(store.hooks) == sorted(expected)
    for hook, activations in expected.items():
        found = torch.stack([store.read_context(hook, context) for context in contexts])
        assert found.dtype == activations.dtype
        assert torch.equal(found.flatten().view(torch.uint8), activations.flatten().view(torch.uint8))


# ---- SAEs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAES)
def test_an_sae_computes_what_it_did(name: str) -> None:
    sae, expected = SAE.from_pretrained(OLD / "saes" / name), load_file(OLD / "saes" / name / "expected.safetensors")
    latents = sae.encode(expected["x"])
    assert torch.equal(latents.indices, expected["indices"])
    torch.testing.assert_close(latents.values, expected["values"], **ROUNDING)
    torch.testing.assert_close(sae.decode(latents), expected["x_hat"], **ROUNDING)
    torch.testing.assert_close(sae(expected["x"]).x_hat, expected["x_hat"], **ROUNDING)


def test_the_saes_are_of_every_kind_and_trained() -> None:
    """Else the test above could pass with thresholds, scales or centres left out."""
    assert len(SAES) == 8
    tensors = {name: load_file(OLD / "saes" / name / "sae.safetensors") for name in SAES}
    assert float(tensors["batchtopk"]["activation.threshold"]) > 0.1
    assert float(tensors["jumprelu"]["activation.log_threshold"].std()) > 1e-3
    assert float(tensors["gated"]["activation.r_mag"].std()) > 1e-3
    assert float(tensors["gated"]["activation.b_mag"].std()) > 1e-3
    assert float(tensors["topk"]["input_mean"].abs().max()) > 0.01
    for name in ("topk", "batchtopk", "jumprelu", "gated"):
        assert abs(float(tensors[name]["input_scale"]) - 1) > 0.05
    for name in SAES:
        assert float(tensors[name]["b_enc"].abs().max()) > 1e-4
        assert int((load_file(OLD / "saes" / name / "expected.safetensors")["indices"] >= 0).sum()) > 8


def test_an_sae_is_scored_on_its_store(server: ForkServer, tmp_path: Path) -> None:
    """Its model included, and the figures are the old ones up to rounding."""
    before = contents(OLD)
    places = [f"run_dir={tmp_path}", f"out_dir={tmp_path}", f"model={OLD / 'model'}", f"store.url={OLD / 'store'}"]
    result = server.run("stage_eval", *places, f"sae.path={OLD / 'saes/jumprelu'}", "device.threads=1")
    assert result.code == 0, result.stderr
    report, expected = (json.loads(path.read_text()) for path in (tmp_path / "eval.json", OLD / "figures.json"))
    assert {name: report[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert contents(OLD) == before


# ---- a training run ------------------------------------------------------------------------------------------------


def test_a_run_under_way_goes_on_or_says_what_to_do(server: ForkServer, tmp_path: Path) -> None:
    """To the weights that it would have ended with; or one line, and its checkpoint is left as it is."""
    folder = tmp_path / "run"
    shutil.copytree(OLD / "run", folder)
    before = contents(folder / "checkpoints")
    places = [f"run_dir={tmp_path}", f"out_dir={folder}", f"store.url={OLD / 'store'}"]
    result = server.run("stage_train", *RUN.split(), *places, "logger.progress=false")
    assert "Traceback" not in result.stderr
    if result.code == 0:
        assert "continuing from step 16 of 33" in result.stderr
        assert_same_weights(folder, OLD / "run-finished")
        return
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.code == 2
    assert re.search("checkpoint.resume=never|finish it with|export it with", line), line
    assert contents(folder / "checkpoints") == before


def assert_same_weights(one: Path, other: Path) -> None:
    """Up to rounding, which 17 steps of Adam make larger."""
    first, second = (SAE.from_pretrained(folder).state_dict() for folder in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            tensor, second[name], rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
