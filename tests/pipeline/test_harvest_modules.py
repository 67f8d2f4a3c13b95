"""A harvest of modules: the activations of a plain forward, only as deep as needed, and what the later stages make."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import granary
from shared.intervene.splice import SplicedModel
from shared.lm import capture
from shared.lm.modulepoint import ModulePoint
from shared.store import Store
from tests.cli import ForkServer
from tests.harvesting import D, Harvester
from tests.pipeline.test_window import training

ALONE: dict[str, object] = {
    "packing": "separate",
    "hooks__layers": None,
    "store__shard_contexts": 2,
    "corpus__contexts": 8,
}


@pytest.fixture(scope="module")
def harvester(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Harvester:
    root = tmp_path_factory.mktemp("modules")
    return Harvester(root, stages.at(root))


def rows(store: Store, site: str) -> np.ndarray:
    return np.stack([store.read_context(site, context) for context in range(store.num_contexts)])


def test_a_harvest_of_modules_equals_a_plain_forward_and_the_hook_of_the_same_place(harvester: Harvester) -> None:
    wanted = {"layers.1.mlp.down_proj:in": 24, "layers.0.self_attn.q_proj": D, "layers.0.self_attn:out[0]": D}
    modules = [f"model.{name}" if "q_proj" in name else name for name in wanted]
    store = harvester.harvest("modules", **ALONE, hooks__modules=json.dumps(modules))
    points = {ModulePoint.parse(name): name for name in wanted}
    assert store.plan.hooks == {point.site: wanted[name] for point, name in points.items()}
    model = AutoModelForCausalLM.from_pretrained(harvester.model)
    for context in range(store.num_contexts):
        real = store.mask([context])[0] | (store.segments([context])[0] >= 0)
        tokens = torch.from_numpy(store.tokens([context]).astype(np.int64))[:, : int(real.sum())]
        with torch.no_grad(), capture(model.model, list(points)) as captured:
            model(tokens)
        for point in points:
            found = torch.from_numpy(np.asarray(store.read_context(point.site, context)))[: tokens.shape[1]]
            torch.testing.assert_close(found, captured[point][0], rtol=1e-5, atol=1e-5)
    by_hook = harvester.harvest("hook", **{**ALONE, "hooks__layers": 1})
    by_module = harvester.harvest("module", **ALONE, hooks__modules="layers.1")
    assert np.array_equal(rows(by_hook, "layers.1.resid_post"), rows(by_module, "layers.1"))


def test_only_the_layers_that_are_needed_are_run(harvester: Harvester) -> None:
    told = harvester.run("dry", **ALONE, hooks__modules="re:layers.0.mlp.*_proj", dry_run=True).stderr
    assert "1 of 3 layers" in told
    assert "layers.0.mlp.gate_proj (24)" in told
    told = harvester.run(
        "dry", **{**ALONE, "hooks__layers": 2}, hooks__sites="[attn_in]", hooks__modules="layers.0.mlp", dry_run=True
    ).stderr
    assert "3 of 3 layers" in told
    assert "layers.2.attn_in; d_model 16; layers.0.mlp (16)" in told


def test_what_does_not_go_is_one_line(harvester: Harvester) -> None:
    for changes, told in (
        ({"hooks__modules": "layers.9"}, "has no module layers.9"),
        ({"hooks__modules": "[1]"}, "hooks.modules=[1]: a path of a module"),
        ({"hooks__modules": '["layers.1.mlp","layers.1.mlp.up_proj"]'}, "lie one inside the other"),
    ):
        assert told in harvester.run("wrong", **ALONE, **changes).error


@pytest.mark.slow
def test_what_is_trained_on_a_module_is_scored_spliced_and_attached(harvester: Harvester) -> None:
    root, site = harvester.root / "all", "layers.1.mlp.down_proj-in"
    store = harvester.harvest(
        "all/store", **{**ALONE, "corpus__contexts": 16}, hooks__modules="layers.1.mlp.down_proj:in", run_dir=root
    )
    split = harvester.run("split", **ALONE, hooks__modules="layers.1", tensor_parallel=2, nproc=2)
    assert (split.code, "hooks.modules does not go with tensor_parallel" in split.stderr) == (2, True)
    trained = harvester.server.run("stage_train", *training(root / "sae", root / "store"), f"hook={site}")
    assert trained.code == 0, trained.stderr
    scored = harvester.server.run("stage_eval", f"run_dir={root}", "device.threads=1")
    assert scored.code == 0, scored.stderr
    assert json.loads((root / "eval.json").read_text())["downstream"]
    model = granary.load_causal_lm(str(harvester.model))
    sae = granary.SAE.from_pretrained(root / "sae")
    tokens = torch.from_numpy(store.tokens([0]).astype(np.int64))
    clean = model(tokens).logits
    with SplicedModel(model, sae) as spliced:
        assert torch.equal(spliced(tokens).logits, clean)
    with granary.attach(model, root / "sae", mode="replace") as saes:
        assert list(saes) == ["layers.1.mlp.down_proj:in"]
        assert not torch.equal(model(tokens).logits, clean)
