"""The dense products of ReLU, JumpReLU and Gated, forward and every gradient, in both compute types."""

import pytest
import torch

from shared.kernels import Compute, encode_topk, linear, product
from shared.kernels.linear import bfloat16_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(function, tensors, upstream):
    """The result, and the gradients by name, of `function` of leaves with these values."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    result = function(**leaves)
    grads = torch.autograd.grad(result, list(leaves.values()), upstream)
    return {"result": result.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize("shape", [(5, 7, 3), (33, 100, 64), (0, 4, 6)])
def test_value_and_every_gradient(shape, monkeypatch):
    monkeypatch.setattr(linear, "FAST_BFLOAT16", True)
    num_rows, width, columns = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a_NM": torch.randn(num_rows, width, generator=generator),
        "b_MK": torch.randn(width, columns, generator=generator),
        "bias_K": torch.randn(columns, generator=generator),
    }
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    upstream = torch.randn(num_rows, columns, generator=generator).to(DEVICE)
    exact = run(lambda a_NM, b_MK, bias_K: a_NM @ b_MK + bias_K, tensors, upstream)
    plain = run(product, tensors, upstream)
    rounded = run(lambda **given: product(**given, compute=Compute(dtype="bfloat16")), tensors, upstream)
    operands = {name: tensor.bfloat16().float() for name, tensor in tensors.items() if name != "bias_K"}
    wanted = run(lambda a_NM, b_MK: a_NM @ b_MK, operands, upstream.bfloat16().float())
    wanted["result"] = wanted["result"] + tensors["bias_K"]
    wanted["dbias_K"] = exact["dbias_K"]
    for name, value in exact.items():
        torch.testing.assert_close(plain[name], value, msg=lambda text, n=name: f"{n}: {text}")
        assert rounded[name].dtype == torch.float32
        # A CPU rounds results to 8 bits; a GPU does not.
        tolerance = 2**-8 * float(wanted[name].abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(
            rounded[name], wanted[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
        if num_rows and name != "dbias_K":
            assert not torch.equal(rounded[name], value), f"{name} was not computed in bfloat16"


def test_gradients_that_nobody_asked_for_are_not_computed():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    product(a, b, compute=Compute(dtype="bfloat16")).sum().backward()
    assert a.grad is not None
    assert b.grad is None


def test_the_kind_of_processor_is_detected_or_chosen():
    """(is there a bfloat16 product, is it fast) for each choice on each of the three kinds."""
    kinds = {"old": (False, False), "middle": (True, False), "new": (True, True)}
    assert {name: bfloat16_products("auto", *kind) for name, kind in kinds.items()} == kinds
    chosen = {choice: bfloat16_products(choice, True, True) for choice in ("none", "slow", "fast")}
    assert chosen == {"none": (False, False), "slow": (True, False), "fast": (True, True)}
    assert bfloat16_products("fast", True, False) == (True, True)
    with pytest.raises(ValueError, match=r"^GRANARY_BFLOAT16=1: choose from auto, none, slow, fast$"):
        bfloat16_products("1", True, True)
    with pytest.raises(ValueError, match="this processor has no bfloat16 product; choose auto or none"):
        bfloat16_products("slow", False, False)


def test_bfloat16_is_float32_where_no_instruction_makes_it_faster(monkeypatch):
    asked, generator = Compute("torch", "bfloat16"), torch.Generator().manual_seed(0)
    a, b = torch.randn(33, 100, generator=generator), torch.randn(100, 64, generator=generator)
    bias = torch.randn(64, generator=generator)
    monkeypatch.setattr(linear, "FAST_BFLOAT16", False)
    assert asked.dtype_for(a) == "float32"
    assert torch.equal(product(a, b, bias, compute=asked), product(a, b, bias))
    for found, wanted in zip(
        encode_topk(a, b.T, bias, 5, compute=asked), encode_topk(a, b.T, bias, 5, compute=Compute("torch")), strict=True
    ):
        assert torch.equal(found, wanted)
    monkeypatch.setattr(linear, "FAST_BFLOAT16", True)
    assert asked.dtype_for(a) == "bfloat16"
    assert not torch.equal(product(a, b, bias, compute=asked), product(a, b, bias))
