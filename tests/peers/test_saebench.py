"""SAEBench's own functions on a dictionary of ours, which SAELens has read, and on our tokens: the same figures.

Its evaluations fetch their texts and models from the hub; what they compute is called here on activations that are at
hand. Letters: N tokens, D width, F latents.
"""

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shared.sae import SAE, SAEConfig
from shared.sae.loading import convert
from shared.sae.rows import decoder_rows
from shared.sae.sites import Sites
from stage_eval.supervised.ablation import ABLATED, along, chosen
from stage_eval.supervised.codes import Codes
from stage_eval.supervised.material import Material
from stage_eval.supervised.perturbation import perturb
from stage_eval.supervised.probing import probe_concept
from stage_eval.supervised.sample import Task
from stage_eval.supervised.splitting import shares
from tests.labelled import concept, material, noise

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not in this environment: make test-peers")
    pytest.importorskip("sae_bench", reason="SAEBench is not in this environment: make test-peers")
    from sae_bench.evals.absorption import feature_absorption_calculator
    from sae_bench.evals.scr_and_tpp import main as tpp
    from sae_bench.evals.sparse_probing import probe_training

N, D, F = 480, 16, 64
KINDS = Task("kinds", ("a", "b"), np.arange(N) // 2 % 2)


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> tuple[SAE, Any]:
    """A random SAE without b_dec, and the same as SAELens loads it."""
    folder = tmp_path_factory.mktemp("saebench")
    config = SAEConfig(
        d_model=D, d_latent=F, k=6, normalisation="none", pre_bias=False, sites=Sites.of("layers.2.resid_post")
    )
    sae = SAE(config, generator=torch.Generator().manual_seed(0))
    sae.save_pretrained(folder / "ours", {"hook": "layers.2.resid_post", "model": {"id": "bundled"}})
    convert(folder / "ours", folder / "theirs", "saelens")
    return sae, sae_lens.SAE.load_from_disk(folder / "theirs").requires_grad_(False)


@pytest.fixture(scope="module")
def tokens() -> tuple[Material, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tokens of two kinds that can be told apart most of the time; by kind [n, 1, D], to fit on and to score on."""
    x_ND = noise(N, D, scale=1.0)
    x_ND[KINDS.group_N == 0, :3] += 1
    of = material(KINDS, x_ND.float())
    halves = [
        {kind: of.y_ND[torch.from_numpy(KINDS.of(kind) & half)][:, None] for kind in KINDS.groups}
        for half in (~of.sample.is_test_N, of.sample.is_test_N)
    ]
    return of, halves[0], halves[1]


def their_probes(of: Material) -> dict[str, Any]:
    """Ours as theirs."""
    found = {}
    for kind in KINDS.groups:
        probe, ours = probe_training.Probe(D, torch.float32), of.probe(KINDS, kind)
        with torch.no_grad():
            probe.net.weight.copy_(ours.weight_D[None])
            probe.net.bias.fill_(ours.bias)
        found[kind] = probe
    return found


def test_targeted_probe_perturbation(dictionary: tuple[SAE, Any], tokens: tuple[Material, Any, Any]) -> None:
    (sae, theirs), (of, fitted, tested) = dictionary, tokens
    codes, _ = Codes.of(sae, of.x_ND, torch.device("cpu"))
    rows, probes = decoder_rows(sae).double(), their_probes(of)
    effects = tpp.get_all_node_effects_for_one_sae(theirs, probes, list(KINDS.groups), False, fitted, 64)
    at = of.rows(KINDS).fitted
    for kind in KINDS.groups:
        apart_F = np.maximum(codes.difference(KINDS.of(kind)[at], at, written=True), 0)
        effect_F = apart_F * along(of.probe(KINDS, kind), rows)
        assert np.allclose(effect_F, effects[kind].numpy(), atol=1e-5)
    # Theirs goes on where no effect is left above 0, and ablates what helps the probe.
    least = min(len(chosen(effects[kind].numpy(), F)) for kind in KINDS.groups)
    counts = [count for count in ABLATED if count <= least]
    assert len(counts) >= 2
    clean = tpp.get_probe_test_accuracy(
        probes, list(KINDS.groups), {kind: x[:, 0] for kind, x in tested.items()}, 64, False
    )
    after = tpp.perform_feature_ablations(
        probes, theirs, 64, tested, effects, counts, list(KINDS.groups), 64, perform_scr=False
    )
    overall, by_kind = tpp.create_tpp_plotting_dict(after, clean)
    found = perturb(of, codes, KINDS, rows)
    for kind in found.kinds:
        assert kind.accuracy.value == pytest.approx(clean[kind.kind], abs=1e-6)
    for place, count in enumerate(counts):
        name = f"tpp_threshold_{count}"
        assert found.score[place].value == pytest.approx(overall[f"{name}_total_metric"], abs=1e-6)
        for kind in found.kinds:
            assert kind.own[place].value == pytest.approx(by_kind[kind.kind][f"{name}_intended_diff_only"], abs=1e-6)
    assert max(one.value or 0 for kind in found.kinds for one in kind.own) > 0.02


def test_sparse_probing(dictionary: tuple[SAE, Any], tokens: tuple[Material, Any, Any]) -> None:
    """The same latents, and the same accuracy but for the ridge, which theirs puts on weights of unscaled latents."""
    (sae, theirs), (of, _, _) = dictionary, tokens
    is_yes_N = KINDS.of("a")
    task = concept(is_yes_N)
    codes, _ = Codes.of(sae, of.x_ND, torch.device("cpu"))
    best, found = probe_concept(material(task, of.x_ND), codes, task)
    labels = torch.from_numpy(is_yes_N).int()
    fitted, tested = (torch.from_numpy(one) for one in (~of.sample.is_test_N, of.sample.is_test_N))
    acts = theirs.encode(of.x_ND)
    for count in (1, 2, 5):
        mask = probe_training.get_top_k_mean_diff_mask(acts[fitted], labels[fitted], count)
        assert sorted(best[:count]) == (~mask).nonzero()[:, 0].tolist()
        few = probe_training.apply_topk_mask_reduce_dim(acts, mask)
        _, accuracy = probe_training.train_sklearn_probe(few[fitted], labels[fitted], few[tested], labels[tested])
        assert found[f"latents {count}"][0] == pytest.approx(accuracy, abs=0.03)
    _, accuracy = probe_training.train_sklearn_probe(of.x_ND[fitted], labels[fitted], of.x_ND[tested], labels[tested])
    assert found["activation"][0] == pytest.approx(accuracy, abs=0.01)


def test_absorption(dictionary: tuple[SAE, Any], tokens: tuple[Material, Any, Any], monkeypatch: Any) -> None:
    """Theirs looks up the activation of a word's token; here the words are the numbers of our tokens."""
    (sae, theirs), (of, _, _) = dictionary, tokens
    direction_D, main = of.probe(KINDS, "a").weight_D, [3, 17]
    direction_D = direction_D / direction_D.norm()
    hook = "blocks.2.hook_resid_post"
    model = SimpleNamespace(
        to_tokens=lambda _: torch.zeros(1, 5),
        run_with_cache=lambda words, names_filter: (
            None,
            {hook: torch.stack([of.y_ND[int(word)] for word in words])[:, None].expand(-1, 2, -1)},
        ),
    )
    calculator = feature_absorption_calculator.FeatureAbsorptionCalculator(model=model, icl_word_list=[])  # type: ignore[arg-type]
    prompts = [SimpleNamespace(base=str(number), word=str(number)) for number in range(N)]
    monkeypatch.setattr(calculator, "_build_prompts", lambda _: prompts)
    wanted = calculator.calculate_absorption(
        theirs, list(map(str, range(N))), direction_D.float(), main, layer=2, show_progress=False
    ).word_results
    codes, base_ND = Codes.of(sae, of.y_ND, torch.device("cpu"))
    assert not base_ND.any()  # theirs takes the whole activation, ours what latents make up: without b_dec the same
    rows = decoder_rows(sae).double()
    along_F = (rows @ direction_D).numpy()
    there_n = (of.y_ND.double() @ direction_D).numpy()
    is_main_F = np.isin(np.arange(F), main)
    full_n, fraction_n = shares(codes, np.arange(N), along_F, along_F / rows.norm(dim=1).numpy(), is_main_F, there_n)
    positive = there_n > 1e-3  # the probe finds no others; theirs divides by it all the same
    assert np.allclose(fraction_n[positive], np.array([one.absorption_fraction for one in wanted])[positive], atol=1e-4)
    assert (full_n[positive] == np.array([one.is_full_absorption for one in wanted])[positive]).all()
    assert 0 < full_n[positive].mean() < 1
    assert 0 < fraction_n[positive].mean() < 1
