"""The layers of a CLT dealt among processes: the weights of one process, few bytes sent, own sites read, resumed."""

import json
import shlex
from math import ceil

import pytest

from tests.cli import ForkServer
from tests.clt_stores import LAYERS, WIDTH, clt_store
from tests.ranks import Runs, assert_same_run

FIXED = shlex.split(
    "variant=clt sae=batchtopk sae.k=6 sae.expansion=4 sae.dead_after_tokens=60 sae.auxk_alpha=0.5 "
    "stream.batch_size=16 stream.lanes=4 schedule.tokens=320 logger.progress=false logger.curves=false logger.every=5 "
    "checkpoint.every=0 reads=layers.*.mlp_in writes=layers.*.mlp_out"
)
LAYERED = "parallel=layers"
SHARED = ["parallel=layers", "parallel.latent=2"]
JUMPRELU = ["sae=jumprelu", "sae.k=null", "sae.penalty=tanh", "sae.penalty_weight=1e-3", "sae.bandwidth=0.5"]
SIDES = (("reads", "mlp_in"), ("writes", "mlp_out"))
CHOICES = {
    "topk": ["sae=topk", "sae.auxk_slope=0.3"],
    "topk_each": ["sae=topk", "variant.k_scope=layer", "sae.k=2"],
    "each": ["variant.k_scope=layer", "sae.k=2", "optim=signum"],
    "jumprelu": [*JUMPRELU, "sae.unit_norm_decoder=false", "sae.preact_weight=1e-2"],
    "l0": [*JUMPRELU, "sae.penalty=l0", "sae.bias_init=geometric_median"],
    "three": [f"{side}=[{','.join(f'layers.{n}.{site}' for n in range(3))}]" for side, site in SIDES],
    "relu": ["sae=relu", "sae.k=null", "sae.penalty=l1", "sae.penalty_weight=1e-2", "optim.ema_decay=0.9"],
}
ROWS, K = 64, 6


@pytest.fixture(scope="module")
def runs(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(stages, tmp_path_factory.mktemp("layers"), *FIXED)
    clt_store(runs.folder / "store")
    runs.alone(runs.job("one"))
    many = ["sae.auxk_alpha=0", f"stream.batch_size={ROWS}", f"sae.k={K}", "schedule.tokens=256", "sae.expansion=2"]
    runs.together(2, runs.job("layers", LAYERED), runs.job("measured", LAYERED, *many, job="measured"))
    return runs


def test_twenty_steps_on_two_processes_equal_one(runs: Runs) -> None:
    """Weights, losses, dead counts: with dead latents, a short batch and a second epoch.

    k counts over the layers of both ranks; so does the norm by which gradients are clipped.
    """
    assert_same_run(runs, "one", "layers")


def test_messages_are_picks_and_own_sites_alone_are_read(runs: Runs) -> None:
    """A value, a number and a gradient for each pair that fires, and no message as large as one site's activations."""
    ends = [json.loads(end) for end in runs.ends["measured"]]
    sites = sorted(site for end in ends for site in end["sites"])
    assert sites == sorted(f"layers.{layer}.{site}" for layer in range(LAYERS) for site in ("mlp_in", "mlp_out"))
    assert all(len(end["sites"]) == LAYERS for end in ends)
    assert {"layers.0.mlp_in", "layers.3.mlp_out"} <= set(
        next(e["sites"] for e in ends if "layers.0.mlp_in" in e["sites"])
    )
    steps, activations = ceil(256 / ROWS), ROWS * WIDTH * 4
    per_latent, pairs = LAYERS * WIDTH * 2 * 4, ROWS * K
    for end in ends:
        assert max(size for _, size in end["messages"]) < activations
        picks = pairs * (4 + 4 + 4 * len(ends)) + ROWS * LAYERS * 4  # numbers, values, gradients to each; rows' counts
        rows = 2 * per_latent  # projection and norms
        choice = 5 * 256 * 8  # the counts by which the batch's threshold is found, and single numbers
        assert sum(size for _, size in end["messages"]) < steps * (picks + rows + choice)


@pytest.mark.slow
def test_every_choice_of_latents_on_two_and_four_processes(runs: Runs) -> None:
    """Also with each layer on two processes, in micro-batches, and resumed under other layouts and numbers of ranks."""
    stop = {"job": "signalled", "step": 9}
    runs.alone(*(runs.job(f"one_{name}", *words) for name, words in CHOICES.items()), runs.job("to_two", **stop))
    runs.together(
        2,
        *(runs.job(f"two_{name}", LAYERED, *words) for name, words in CHOICES.items()),
        *(runs.job(f"shared_{name}", *SHARED, *words) for name, words in CHOICES.items()),
        runs.job("to_two", LAYERED),
        runs.job("from_two", LAYERED, **stop),
        runs.job("to_four", LAYERED, **stop),
        runs.job("shared", *SHARED, "optim.micro_batch=5"),
        runs.job("half", LAYERED, "optim.moments=bfloat16"),
    )
    runs.alone(runs.job("from_two"))
    runs.together(
        4,
        runs.job("four", LAYERED),
        runs.job("four_shared", *SHARED),
        runs.job("to_four", *SHARED),
        runs.job("four_jumprelu", *SHARED, *CHOICES["jumprelu"]),
    )
    for name in ("to_two", "from_two", "to_four", "shared", "four", "four_shared"):
        assert runs.ends[name] == {"done"}
        assert_same_run(runs, "one", name)
    assert runs.ends["half"] == {"done"}  # rounded at random, other numbers for other pieces
    for name in CHOICES:
        # Under l0 a pair at the edge of the window that teaches a threshold may fall on either side: one latent's does.
        bound = 1e-3 if name == "l0" else 1e-4
        assert_same_run(runs, f"one_{name}", f"two_{name}", bound)
        assert_same_run(runs, f"one_{name}", f"shared_{name}", bound)
    assert_same_run(runs, "one_jumprelu", "four_jumprelu", bound=1e-4)


@pytest.mark.slow
def test_what_layers_cannot_do_is_said_on_all_ranks(runs: Runs) -> None:
    hooks = ["reads=layers.1.mlp_in", "writes=layers.1.mlp_out"]
    runs.together(
        2,
        runs.job("single", LAYERED, *hooks),
        runs.job("sae", LAYERED, "variant=sae", "reads=null", "writes=null", "hook=layers.1.mlp_in"),
        runs.job("muon", LAYERED, "optim=muon"),
        runs.job("skip", LAYERED, "stream.on_damage=skip"),
        runs.job("from", LAYERED, "init_from=elsewhere"),
        runs.job("odd", *SHARED, "sae.d_latent=12"),
    )
    for name, line in (
        ("single", "1 layers can't be dealt among 2 owners: give parallel.latent=..."),
        ("sae", "parallel=layers deals the layers of a clt, not a sae"),
        ("muon", "optim.kind=muon needs whole decoder rows"),
        ("skip", "stream.on_damage=skip with parallel=layers"),
        ("from", "init_from with parallel=layers"),
        ("odd", "3 latents of a layer do not divide among parallel.latent=2"),
    ):
        (told,) = runs.ends[name]
        assert line in told
