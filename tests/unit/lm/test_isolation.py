"""The probe: what it tries, what it finds on models that leak on purpose, and what it calls a difference."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, MistralConfig, Phi3Config, PreTrainedModel

from shared.basics.errors import GranaryError
from shared.lm.hookpoint import HookPoint
from shared.lm.isolation import (
    measure_isolation,
    pack_documents,
    position_differences,
    position_limits,
    probe_lengths,
)
from shared.lm.packed import DOCUMENT_SDPA
from tests.families import GQA

HOOKS = [HookPoint(0, "attn_out"), HookPoint(1, "resid_post")]


def build(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModel.from_config(LlamaConfig(**GQA), attn_implementation=DOCUMENT_SDPA, dtype=dtype)
    return model.eval().requires_grad_(False)


def documents(lengths: tuple[int, ...] = (7, 20, 3, 11)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 50, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_contexts", [1, 4])
def test_a_model_that_isolates_passes(dtype: torch.dtype, batch_contexts: int) -> None:
    found = measure_isolation(build(dtype), HOOKS, documents(), seq_len=24, batch_contexts=batch_contexts)
    assert found.holds
    assert found.worst < found.tolerance
    assert (found.documents, found.tokens) == (4, 41)


def leak_last_state(block: nn.Module, width: int) -> None:
    """Positions see the mean of the `width` positions before them, whatever document those belong to."""

    def on_output(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output + sum(torch.roll(output, shift, dims=1) for shift in range(1, width + 1)) / width

    block.register_forward_hook(on_output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 3])
def test_a_state_that_runs_on_is_found(dtype: torch.dtype, width: int) -> None:
    model = build(dtype)
    leak_last_state(model.layers[1], width)
    found = measure_isolation(model, HOOKS, documents(), seq_len=64, batch_contexts=1)
    assert not found.holds
    assert found.where.startswith("layers.1.resid_post at positions 0")


def test_what_is_computed_from_the_whole_batch_is_found() -> None:
    """As rope variants do: a factor that follows the longest document of a forward, in another context or not."""
    for batch_contexts, holds in ((1, True), (2, False)):
        model = build()
        model.layers[0].register_forward_hook(lambda _m, _a, out: out * (1 + 0.1 * len(out)))
        lengths = (7, 20)
        found = measure_isolation(model, HOOKS, documents(lengths), seq_len=20, batch_contexts=batch_contexts)
        assert found.holds is holds


def test_what_is_right_at_the_front_of_a_context_alone_is_found() -> None:
    """As a bias by distance in bfloat16, which counts to 256."""
    model = build()
    model.layers[1].register_forward_hook(
        lambda _m, _a, out: out * (1 + 0.1 * (torch.arange(out.shape[1]) > 50))[:, None]
    )
    assert measure_isolation(model, HOOKS, documents(), seq_len=51, batch_contexts=2).holds
    found = measure_isolation(model, HOOKS, documents(), seq_len=64, batch_contexts=2)
    assert not found.holds
    assert found.where.startswith("layers.1.resid_post at positions")


def test_attention_across_documents_is_found() -> None:
    model = build()
    model.set_attn_implementation("sdpa")  # without the spans, and the mask that stands in their place
    model.register_forward_pre_hook(
        lambda _m, args, kwargs: (args, {k: v for k, v in kwargs.items() if k in ("input_ids", "use_cache")}),
        with_kwargs=True,
    )
    found = measure_isolation(model, HOOKS, documents(), seq_len=64, batch_contexts=1)
    assert not found.holds
    assert found.worst > 0.1


def test_a_forward_that_fails_says_so() -> None:
    model = build()

    def refuse(_module: nn.Module, _args: object, kwargs: dict[str, object]) -> None:
        if "document_spans" in kwargs:
            raise TypeError("forward() got an unexpected keyword argument 'document_spans'\nand more")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(GranaryError, match=r"packed into one context, its forward fails \(TypeError: .*spans'\)"):
        measure_isolation(model, HOOKS, documents(), seq_len=64, batch_contexts=1)


def test_differences_are_relative_to_the_document_alone() -> None:
    wanted = torch.eye(4)
    got = wanted.clone()
    got[1] *= 1.5
    assert position_differences(got, wanted).tolist() == [0, 0.5, 0, 0]
    wanted[2] = 0  # of a zero row a tenth of the median norm
    got[2] = torch.tensor([0.0, 0, 0.05, 0])
    assert position_differences(got, wanted)[2].item() == pytest.approx(0.5)
    got[3], wanted[3] = torch.nan, torch.nan
    got[0] = torch.inf
    assert position_differences(got, wanted)[[0, 3]].tolist() == [torch.inf, 0]


def test_limits_are_read_from_any_depth_of_the_configuration() -> None:
    assert position_limits(LlamaConfig(**GQA)) == []
    assert position_limits(MistralConfig(**GQA, sliding_window=16)) == [16]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    rope |= {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4}
    phi = Phi3Config(**GQA, rope_parameters=rope, original_max_position_embeddings=32, sliding_window=9)
    assert position_limits(phi) == [9, 32]
    chunked = LlamaConfig(**GQA)
    chunked.attention_chunk_size, chunked.use_window = 40, True
    assert position_limits(chunked) == [40]


@pytest.mark.parametrize(("limits", "longest"), [({}, 41), ({"sliding_window": 500}, 524), ({"window_size": 5000}, 41)])
def test_a_document_is_longer_than_each_limit_that_a_context_can_cross(limits: dict[str, int], longest: int) -> None:
    config = LlamaConfig(**GQA)
    for name, value in limits.items():
        setattr(config, name, value)
    lengths = probe_lengths(config, seq_len=2048, most_tokens=8192)
    assert max(lengths) == longest
    assert sum(lengths) <= 8192
    assert lengths[0] < lengths[1] > lengths[2] or not limits  # short ones before and behind a long one


def test_the_probe_costs_no_more_than_its_cap() -> None:
    config = LlamaConfig(**GQA)
    config.sliding_window, config.attention_chunk_size, config.block_size = 300, 900, 7000
    lengths = probe_lengths(config, seq_len=8192, most_tokens=1400)
    assert sum(lengths) <= 1400
    assert {324, 924} < set(lengths)
    assert max(probe_lengths(config, seq_len=16, most_tokens=1400)) == 16


def test_documents_are_packed_in_order() -> None:
    contexts = pack_documents(documents((7, 20, 3, 11, 32)), seq_len=32)
    assert contexts == [[0, 1, 2], [3], [4]]
