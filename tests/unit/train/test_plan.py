"""The plan of a training run: each formula against the real tensors, the peak they add up to, and the command line."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from shared.basics.units import GIB
from shared.kernels.linear import linear
from shared.kernels.pairs import PairOrder
from shared.kernels.trace import Trace
from shared.sae import SAE, SAEConfig
from shared.sae.optim import OPTIMISERS, make_optimiser
from shared.store import Store
from stage_train.data.inputs import order_of
from stage_train.data.stream import TokenStream
from stage_train.plan.__main__ import planned
from stage_train.plan.memory import find_memory
from stage_train.plan.run import PlannedRun
from stage_train.state.staging import HostCopies
from stage_train.state.tensor_files import TensorWriter
from tests.cli import ForkServer

# Per rank of 8: a dictionary of 2 GiB in weights, planned without a store.
D, F = 512, 32768
LARGE = [
    *(f"d_model={D}", "seq_len=1024", "nproc=8", f"sae.d_latent={F}", "sae.k=64", "stream.batch_size=2048"),
    "sae.encoder_init=transpose",
]

ONE_LAYER = ["variant=clt", "reads=layers.0.mlp_in", "writes=layers.0.mlp_out"]
TWO_LAYERS = ["variant=clt", "layers=2", "reads=layers.*.mlp_in", "writes=layers.*.mlp_out"]


def test_a_trace_adds_up_what_is_alive_together() -> None:
    with FakeTensorMode(), Trace(picks=3, lengths={}) as trace:
        kept = torch.empty(1 << 20)
        (torch.empty(1 << 22) * 2).sum()  # two of 16 MiB
        del kept
        torch.empty(1 << 23)  # 32 MiB: mapped
    found = trace.storages
    assert found.peak == (4 << 20) + 2 * (16 << 20)
    assert (found.large, found.small) == (32 << 20, found.peak)


def test_a_trace_knows_no_values_but_counts() -> None:
    with FakeTensorMode(), Trace(picks=3, lengths={8: 2}) as trace:
        x, mask = torch.empty(5, 8), torch.empty(8) > 0
        assert x[x > 0].shape == (15,)
        assert mask.nonzero().shape == (2, 1)
        assert int(torch.arange(7)[3:][-1]) == 6
        assert not (x == 1).any()
        assert x.isfinite().all()
        large = torch.empty(1 << 20)
        large.untyped_storage().resize_(0)
        assert sum(size for _, size in trace.storages.alive()) < 1 << 20
        assert torch.bincount(torch.empty(5, dtype=torch.int64), minlength=9).tolist() == [5] + [0] * 8
    assert trace.storages.peak > 4 << 20
    with FakeTensorMode(), Trace(picks=3, lengths={}) as trace:
        torch.empty(3, 4) @ torch.empty(4, 5)
        linear(torch.empty(3, 4), torch.empty(5, 4))
    assert trace.flop == 2 * (2 * 3 * 4 * 5)


def test_in_a_trace_all_latents_fire_alike() -> None:
    order = PairOrder(torch.zeros(4, 2, dtype=torch.int64), 5)
    with FakeTensorMode(allow_non_fake_inputs=True), Trace(picks=2, lengths={}):
        assert order.starts() == [0, 1, 3, 4, 6, 8]
    assert order.starts() == [0, 8, 8, 8, 8, 8]


@pytest.mark.parametrize("kind", ["adam", "muon", "signum"])
def test_state_is_counted_as_it_is_made(kind: str) -> None:
    sae = SAE(SAEConfig(d_model=8, d_latent=32, k=3))
    optimiser = make_optimiser(sae, OPTIMISERS[kind].config_type(lr=1e-3))
    sizes = [sum(tensor.nbytes for tensor in part.state_dict().values()) for part in (sae, optimiser)]
    own = ["d_model=8", "seq_len=16"]
    cfg = planned([*own, "sae.d_latent=32", "sae.k=3", "device.name=cpu", f"optim={kind}", "stream.lanes=4"])
    memory = find_memory(PlannedRun(cfg))
    counters = memory.disk - (cfg.checkpoint.keep + 1) * sum(sizes) - sizes[0]
    assert 0 <= counters <= (cfg.checkpoint.keep + 1) * (32 * 9 + 256)  # of dead latents, metrics


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("prefetch", [0, 5 * 16 * 12 * 4, 1 << 30])
def test_the_pool_is_as_large_as_the_stream_makes_it(
    planted_store: Callable[..., Store], tmp_path: Path, nproc: int, prefetch: int
) -> None:
    url = planted_store(tmp_path / "store").url
    # So large a batch that the peak comes in the step, when the stream is there.
    step = ["stream.batch_size=256", "stream.lanes=4", "sae.encoder_init=transpose"]
    cfg = planned([f"store.url={url}", "device.name=cpu", *step])
    cfg = replace(cfg, nproc=nproc, stream=replace(cfg.stream, prefetch_gib=prefetch / GIB))
    run = PlannedRun(cfg)
    memory, data = find_memory(run), run.tokens
    with TokenStream(data, run.formats, order_of(cfg), world=nproc, prefetch_bytes=prefetch) as stream:
        next(stream)
        assert memory.blocks["stream"] == sum(rows.nbytes for rows in stream._pool.rows_SxT_D.values())
    assert memory.blocks["masks of the store"] == data.mask_bits.nbytes + data.counts.nbytes


def test_a_staged_state_is_a_copy_on_the_host(tmp_path: Path) -> None:
    state = {"a": torch.arange(4.0), "b": torch.zeros((), dtype=torch.int64)}
    staged = TensorWriter(tmp_path, HostCopies()).stage(state)
    state["a"].zero_()
    assert staged["a"].tolist() == [0, 1, 2, 3]
    assert staged["b"].dtype == torch.int64


@pytest.fixture(scope="module")
def server(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> ForkServer:
    return stages.at(tmp_path_factory.mktemp("plan"))


@pytest.fixture
def plan(server: ForkServer) -> Callable[..., dict[str, object]]:
    """The JSON that the command prints."""

    def run(*overrides: str) -> dict[str, object]:
        result = server.run("stage_train.plan", "json=true", *overrides)
        assert result.code == 0, result.stderr
        document: dict[str, object] = json.loads(result.stdout)
        return document

    return run


def memory_of(document: dict[str, object]) -> dict[str, int]:
    found = document["memory"]
    assert isinstance(found, dict)
    return {**found, **found["blocks"]}


def test_a_layout_divides_what_it_says(plan: Callable[..., dict[str, object]]) -> None:
    whole, fsdp, latent = (
        memory_of(plan(*LARGE, "stream.batch_size=512", "stream.lanes=8", "device.name=cuda", f"parallel={layout}"))
        for layout in ("ddp", "fsdp", "latent")
    )
    assert fsdp["weights"] == pytest.approx(whole["weights"] / 8, rel=1e-3)
    assert fsdp["optimiser moments"] == pytest.approx(whole["optimiser moments"] / 8, rel=1e-3)
    matrices = 2 * 4 * F * D
    assert whole["total"] > 4 * matrices  # weights, moments, gradients
    assert whole["total"] > fsdp["total"] > 2 * matrices  # the whole gradients, and a buffer to send them from
    assert fsdp["total"] > latent["total"] > matrices  # before it keeps its part, a rank holds all weights once
    libraries = "interpreter, torch, libraries (measured)"
    assert libraries not in whole
    assert memory_of(plan("d_model=16", "device.name=cpu"))[libraries] > 100e6


def test_a_transcoder_is_planned_from_what_it_reads_and_writes(plan: Callable[..., dict[str, object]]) -> None:
    base = ["d_model=64", "sae.d_latent=1024", "device.name=cpu", "sae.encoder_init=transpose"]
    sae = memory_of(plan(*base))
    other = memory_of(plan(*base, "variant=transcoder", "reads=layers.2.mlp_in", "writes=layers.2.mlp_out"))
    assert other["batch"] == 2 * sae["batch"]
    assert other["stream"] == 2 * sae["stream"]


@pytest.mark.slow
def test_a_molt_is_planned_by_the_ranks_of_what_fires(plan: Callable[..., dict[str, object]]) -> None:
    """Products of the encoder, and those of each pick: V x, U h, and their gradients, 5 of a mean rank of 10."""
    base = ["d_model=64", "device.name=cpu", "sae.encoder_init=transpose", "sae.auxk_alpha=0", "variant=molt"]
    base += ["variant.ranks={20:8,5:16}", "reads=layers.2.mlp_in", "writes=layers.2.mlp_out", "schedule.tokens=100_000"]
    flop = []
    for k in (2, 6):
        pace = plan(*base, f"sae.k={k}")["pace"]
        assert isinstance(pace, dict)
        flop.append(pace["gflop_per_token"] * 1e9)
    assert flop[1] - flop[0] == pytest.approx(4 * 5 * 2 * 10 * 64, rel=0.05)


@pytest.mark.slow
def test_a_pattern_stands_for_as_many_layers_as_are_said(
    server: ForkServer, plan: Callable[..., dict[str, object]]
) -> None:
    sites = ["variant=clt", "reads=layers.*.mlp_in", "writes=layers.*.mlp_out"]
    base = ["d_model=64", "sae.d_latent=256", "device.name=cpu", "schedule.tokens=2_048_000", *sites]
    read = [plan(*base, f"layers={layers}")["pace"]["read_bytes"] for layers in (1, 4)]  # type: ignore[index]
    assert read == [2 * 64 * 2 * layers * 2_048_000 for layers in (1, 4)]
    assert "give layers=" in server.run("stage_train.plan", *base).error


@pytest.mark.slow  # with those below it, and tests/unit/train/test_plan_memory.py, which measures
def test_less_is_planned_where_less_is_asked_for(plan: Callable[..., dict[str, object]]) -> None:
    base = [
        "d_model=512",
        "sae.d_latent=16384",
        "device.name=cpu",
        "stream.batch_size=4096",
        "sae.encoder_init=transpose",
    ]
    total = memory_of(plan(*base))["total"]
    assert memory_of(plan(*base, "optim.moments=bfloat16"))["total"] < total
    assert memory_of(plan(*base, "optim.ema_decay=0.9"))["total"] > total


@pytest.mark.slow
def test_less_is_planned_without_checkpoints_and_in_micro_batches(plan: Callable[..., dict[str, object]]) -> None:
    base = ["d_model=512", "sae.d_latent=16384", "device.name=cpu", "stream.batch_size=4096"]
    base += ["sae.encoder_init=transpose"]
    assert memory_of(plan(*base, "checkpoint.every=0"))["total"] < memory_of(plan(*base))["total"]
    dense = [*base, "sae=relu"]
    assert memory_of(plan(*dense, "optim.micro_batch=512"))["total"] < memory_of(plan(*dense))["total"]


def test_time_and_reading_follow_from_the_speed(plan: Callable[..., dict[str, object]]) -> None:
    document = plan(*LARGE, "tokens_per_s=1000", "schedule.tokens=8192000", "parallel=latent", "nodes=2")
    assert document["steps"] == 4000
    pace = document["pace"]
    assert isinstance(pace, dict)
    assert pace["seconds"] == 8192
    assert pace["read_mb_s"] == pytest.approx(2 * D * 1000 / 1e6)  # both machines read all rows
    assert pace["read_bytes"] == 2 * 2 * D * 8192000  # as often as there are machines
    estimated = plan(*LARGE, "tflops=100", "dead_fraction=0", "device.name=cpu")["pace"]
    assert isinstance(estimated, dict)
    product, counted = 2 * F * D, 1e9 * estimated["gflop_per_token"]
    assert product <= counted < 2.01 * product  # the encoder's, which a CPU may make twice
    assert estimated["tokens_per_s"] == pytest.approx(8 * 100e12 / (counted * 1.75))


def test_steps_are_timed_on_request(plan: Callable[..., dict[str, object]]) -> None:
    document = plan("d_model=32", "sae.d_latent=256", "sae.k=4", "device.name=cpu", "measure=true")
    pace = document["pace"]
    assert isinstance(pace, dict)
    assert pace["tokens_per_s"] > 0


def test_a_store_gives_width_length_and_tokens(
    server: ForkServer, plan: Callable[..., dict[str, object]], planted_store: Callable[..., Store], tmp_path: Path
) -> None:
    url = planted_store(tmp_path / "store").url
    document = plan(f"store.url={url}", "sae.k=3", "stream.batch_size=16", "stream.lanes=4", "schedule.tokens=64")
    assert document["steps"] == 4
    sae = document["sae"]
    assert isinstance(sae, dict)
    assert sae["d_model"] == 12
    assert not list(server.folder.glob("runs*"))  # a plan writes nothing
    assert not list(server.folder.glob("outputs*"))


def test_the_table_names_peak_total_and_what_is_assumed(server: ForkServer) -> None:
    long = ["schedule.tokens=1_000_000_000", "disk_mb_s=1", "tflops=100", "device.name=cuda"]
    result = server.run("stage_train.plan", *LARGE, *long)
    assert result.code == 0, result.stderr
    for piece in ("weights", "total", "3,277 dead latents", "training would wait", "host memory", "CUDA context"):
        assert piece in result.stdout, piece


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        pytest.param(
            [*LARGE, "memory_gib=0.3", "device.name=cuda"],
            r"a rank needs \d+.* memory_gib=0\.3 .*: parallel.layout=latent takes",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [*LARGE, "sae.d_latent=8192", "memory_gib=0.01", "device.name=cuda"],
            "take more ranks, fewer latents, or a larger memory",
            marks=pytest.mark.slow,
        ),
        ([*LARGE, "sae.k=300000"], "sae.k=300000 is more than the 32768 latents"),
        ([*LARGE, "parallel=latent", "sae.d_latent=32766"], "32766 latents do not divide among parallel.latent=8"),
        ([*LARGE, "parallel=fsdp", "sae.d_latent=32766"], "32766 latents do not divide among 8 processes"),
        ([*LARGE, "parallel=latent", "parallel.latent=3"], "parallel.latent=3 does not divide the 8 processes"),
        ([*LARGE, "parallel=other"], "no option 'other' in group 'parallel'"),
        ([*LARGE, "stream.lanes=12"], "stream.lanes: 12 lanes do not divide among 8 processes"),
        ([*LARGE, "optim.moments=null"], "optim.kind=adam needs a value for optim.moments"),
        ([*LARGE, "compute.kernels=fast"], "kernels='fast': choose from auto"),
        ([*LARGE, "schedule.tokens=null", "schedule.epochs=1"], "nobody knows how long an epoch is"),
        ([*LARGE, "tflops=-1"], "tflops=-1.0: must be above 0"),
        pytest.param(
            [*LARGE, *TWO_LAYERS, "sae.d_latent=2048", "memory_gib=0.01", "device.name=cuda"],
            "take more ranks, fewer latents, or a larger memory",  # its latents can't be split
            marks=pytest.mark.slow,
        ),
        (
            [*LARGE, *ONE_LAYER, "parallel=latent"],
            "a clt has its latents layer by layer: use parallel=layers, ddp or fsdp",
        ),
        ([*LARGE, "sae.expantion=4"], "did you mean 'sae.expansion'"),
        (["store.url=nowhere"], "or plan without a store: give d_model"),
    ],
)
def test_what_cannot_be_is_one_line(server: ForkServer, overrides: list[str], line: str) -> None:
    error = server.run("stage_train.plan", *overrides).error
    assert re.search(line, error), error


@pytest.mark.slow
def test_a_frozen_base_is_added_to_each_rank(stages: ForkServer, tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8
    ).save_pretrained(tmp_path)
    plain = ["d_model=64", "nproc=8", "sae.d_latent=512", "sae.k=4", "stream.batch_size=512", "parallel=latent",
             "schedule.tokens=10_000", "device.name=cuda", "json=true"]  # fmt: skip
    alone, beside = (
        json.loads(stages.run("stage_train.plan", *plain, *more).stdout)
        for more in ([], [f"base={tmp_path}", "base_layer=1", "base_tensor_parallel=4"])
    )
    frozen = beside["base"]
    assert frozen["split"] == 2 * 2 * (4 * 64 * 64 + 3 * 64 * 96) // 4
    assert frozen["whole"] == 2 * (32_000 * 64 + 2 * 2 * 64)
    assert beside["memory"]["total"] - alone["memory"]["total"] == sum(
        frozen[one] for one in ("split", "whole", "tower")
    )
    told = stages.run("stage_train.plan", *plain[:-1], f"base={tmp_path}", "base_layer=1")
    assert "base: " in told.stdout
    assert "2 of 4 layers, split over 8 ranks" in told.stdout
    wrong = stages.run("stage_train.plan", *plain, f"base={tmp_path}", "base_tensor_parallel=3")
    assert wrong.error == "base_tensor_parallel=3 does not divide the 8 ranks"
