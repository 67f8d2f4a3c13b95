"""Isolated documents have the activations they have alone, or the harvest ends in a line before anything is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shared.lm import capture
from shared.lm.hookpoint import HookPoint
from shared.store import Store
from tests.cli import ForkServer
from tests.harvesting import VOCAB, Harvester, make_model

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 48,
    "long_factor": [1.0, 4.0, 16.0, 48.0],
    "short_factor": [1.0, 1.01, 1.02, 1.03],
}
# Each leaks its own way: chunks counted from the context's start, a state beside attention, a state alone.
LEAKING: dict[str, dict[str, Any]] = {
    "llama4_text": {
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 16,
        "no_rope_layers": [1, 1, 1, 0],
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_d_conv": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_n_heads": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "residual_multiplier": 0.22,
    },
    "mamba": {"state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 4},
}


@pytest.fixture(scope="module")
def harvester(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Harvester:
    root = tmp_path_factory.mktemp("isolation")
    return Harvester(root, stages.at(root))


def model(harvester: Harvester, family: str, **keys: object) -> Path:
    """A model of random weights large enough for every branch to matter, with the bundled tokenizer."""
    folder = harvester.root / family
    if not folder.exists():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **keys})).float()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0, 0.2)
        make_model(folder, made)
    return folder


def worst_row(store: Store, folder: Path, hook: HookPoint) -> float:
    """Largest relative difference of a stored row from the document alone in plain transformers, eager attention."""
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    worst = 0.0
    for context in range(store.num_contexts):
        segments = store.segments([context])[0]
        for segment in range(segments.max() + 1):
            here = segments == segment
            ids = torch.from_numpy(store.tokens([context])[0][here]).long()[None]
            with torch.no_grad(), capture(whole, [hook]) as got:
                whole(ids, use_cache=False)
            stored = store.read_context(str(hook), context)[torch.from_numpy(here)]
            far = (stored - got[hook][0]).norm(dim=1) / got[hook][0].norm(dim=1)
            worst = max(worst, far.max().item())
    return worst


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow if name == "granitemoehybrid" else ()) for name in LEAKING],
)
def test_a_model_that_leaks_is_refused_and_harvested_separately(harvester: Harvester, family: str) -> None:
    folder = model(harvester, family, **LEAKING[family])
    changes: dict[str, Any] = {"model": folder, "packing__seq_len": 128, "store__heldout_fraction": 0}
    error = harvester.run(f"{family}-isolated", **changes)
    last = error.stderr.splitlines()[-1]
    assert error.code == 2
    assert last.startswith(f"error: packing=isolated does not hold for this model ({family}, "), last
    assert "layers.1.resid_post at positions " in last
    assert "packing=separate gives each document a context of its own" in last
    assert "Traceback" not in error.stderr
    assert not (harvester.root / f"{family}-isolated").exists()
    assert not list((harvester.root / "run").glob("spool-*"))

    store = harvester.harvest(f"{family}-separate", **{**changes, "packing": "separate", "corpus__contexts": 12})
    assert all(store.segments([context]).max() == 0 for context in range(12))
    assert worst_row(store, folder, HookPoint(1, "resid_post")) < 1e-3
    assert store.plan.versions["isolation"] == "each document was run alone"
    padding = torch.from_numpy(store.segments([0])[0] == -1)
    assert padding.any()
    assert store.read_context("layers.1.resid_post", 0)[padding].abs().max() == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_long_document_does_not_change_its_short_neighbours(harvester: Harvester, attention: str) -> None:
    """longrope turns short documents by other factors than those beyond the original number of positions."""
    folder = model(harvester, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=48)
    changes = {"model": folder, "model__attn_implementation": attention, "packing__seq_len": 128}
    store = harvester.harvest(f"phi3-{attention}", **changes, store__heldout_fraction=0)
    assert worst_row(store, folder, HookPoint(1, "resid_post")) < 1e-3


@pytest.mark.parametrize(
    ("family", "keys", "attention"),
    [
        ("gpt2", {}, "sdpa"),
        pytest.param("gpt2", {}, "eager", marks=pytest.mark.slow),
        ("opt", {"ffn_dim": 48}, "sdpa"),
        ("opt", {"ffn_dim": 48}, "eager"),
        ("phi", {}, "sdpa"),
        pytest.param("phi", {}, "eager", marks=pytest.mark.slow),
    ],
)
def test_models_whose_layers_have_other_names(
    harvester: Harvester, family: str, keys: dict[str, object], attention: str
) -> None:
    folder = model(harvester, family, **keys)
    result = harvester.run(
        f"{family}-{attention}", model=folder, model__attn_implementation=attention, packing__seq_len=64
    )
    if result.code:
        assert (family, attention) == ("opt", "eager")
        assert "packing=isolated does not hold for this model (opt, eager attention)" in result.stderr
        return
    store = Store.open(harvester.root / f"{family}-{attention}")
    assert worst_row(store, folder, HookPoint(1, "resid_post")) < 1e-3


def test_the_figure_is_kept_beside_the_plan_and_not_in_it(harvester: Harvester) -> None:
    probed, trusted, joined = (
        harvester.harvest(name, **changes)
        for name, changes in (
            ("probed", {}),
            ("trusted", {"model__probe": "false"}),
            ("joined", {"packing": "joined"}),
        )
    )
    assert "packed and alone, differ by" in probed.plan.versions["isolation"]
    assert "(tolerance 1e-03)" in probed.plan.versions["isolation"]
    assert trusted.plan.versions["isolation"] == "not probed (model.probe=false)"
    assert "isolation" not in joined.plan.versions
    assert probed.plan.hash() == trusted.plan.hash()
    assert probed.digest() == trusted.digest()


def test_a_model_that_cannot_be_loaded_costs_no_tokenising(harvester: Harvester) -> None:
    result = harvester.run("unloadable", model__attn_implementation="no_such_attention")
    assert result.code == 2
    assert "can't be loaded" in result.stderr
    assert "tokenis" not in result.stderr
    assert not (harvester.root / "unloadable").exists()
