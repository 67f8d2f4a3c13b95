"""Stage ``checks``: every operation at full size against float64, on a sample of its rows; outputs poisoned before.

The kernels' tests are small and never leave the first tile. Here are many tiles, cuts of the candidate buffers, ragged
last blocks, a latent that fires on every token, and two runs that must give the same bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from step_providers import Shape, make_batch

from gpu_stages.context import Context
from shared.kernels import (
    AdamStep,
    Compute,
    PairGradient,
    PairOrder,
    add_at,
    decode,
    dot_picks,
    encode_threshold,
    encode_topk,
)
from shared.kernels import row_grad as grad_of_rows
from shared.kernels.encode_topk.triton import tiles

SAMPLE = 64
DENSE = 5
"""The latent that fires on every token."""
SIZES = {
    "even": Shape(4096, 131072, 64, 8192),
    "ragged": Shape(4095, 131071, 65, 8191),
    "large": Shape(4096, 262144, 128, 8192),
}


def run(context: Context, size: str) -> None:
    """All operations at one size."""
    shape = SIZES[size]
    if context.rehearse:
        shape = Shape(23, 71, 5, 7) if size == "ragged" else Shape(24, 70, 4, 6)
    device = context.device
    x = make_batch(shape, device)
    generator = torch.Generator(device=device).manual_seed(0)
    W = torch.randn(shape.d_latent, shape.d_model, device=device, generator=generator)
    W.div_(W.norm(dim=1, keepdim=True))
    b = 0.1 * torch.randn(shape.d_latent, device=device, generator=generator)
    b[DENSE] = 100.0
    with poisoned():
        values, indices = check_encode(context, shape, x, W, b)
        check_threshold(context, x, W, b, float(values[:, -1].median()))
        grad = torch.randn(x.shape, device=device, generator=generator)
        check_gathers(context, values, indices, W, grad)
        check_gradients(context, shape, values, indices, W, grad)
        check_nothing_fires(context, x, W, b)
        check_sums(context, values, indices, shape.d_latent)


@contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` gives what no kernel may leave behind."""
    empty = torch.empty

    def poison(*args, **kwargs):  # type: ignore[no-untyped-def]
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**31) + 7)

    torch.empty = poison  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty


def some(count: int, device: str) -> torch.Tensor:
    """Indices of a sample with the first and the last in it."""
    step = max(1, count // SAMPLE)
    return torch.unique(torch.cat([torch.arange(0, count, step), torch.tensor([count - 1])])).to(device)


def relative(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((result.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def check_encode(
    context: Context, shape: Shape, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Picks of sampled rows are exactly those of sorting the same products, and the products those of float64."""
    compute = Compute(context.kernels, "bfloat16")
    values, indices = encode_topk(x, W, b, shape.k, compute=compute)
    again = encode_topk(x, W, b, shape.k, compute=compute)
    same = torch.equal(values, again[0]) and torch.equal(indices, again[1])
    context.check("encode_topk, the same bits twice", float(not same), 0)
    sample = some(len(x), context.device)
    z = torch.empty(len(sample), shape.d_latent, device=context.device)
    for rows, columns, z_TC in tiles(x, W, "bfloat16"):
        within = (sample >= rows.start) & (sample < rows.stop)
        if bool(within.any()):
            z[within, columns.start : columns.stop] = z_TC[sample[within] - rows.start] + b[columns]
    exact = x[sample].bfloat16().double() @ W.bfloat16().double().T + b.double()
    context.check("encode_topk, product", relative(z, exact), 1e-5)
    best, latents = z.relu().sort(dim=1, descending=True, stable=True)
    best, latents = best[:, : shape.k], latents[:, : shape.k].masked_fill(best[:, : shape.k] == 0, -1)
    context.check("encode_topk, picks", int((latents != indices[sample]).sum()), 0, rows=len(sample))
    context.check("encode_topk, values", int((best != values[sample]).sum()), 0)
    context.check("encode_topk, every index in range", int(((indices < -1) | (indices >= len(W))).sum()), 0)
    return values, indices


def check_threshold(context: Context, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, threshold: float) -> None:
    """As many pairs pass as a comparison of the same products says, in the whole batch."""
    values, indices = encode_threshold(x, W, b, threshold, compute=Compute(context.kernels, "bfloat16"))
    count = torch.zeros(len(x), dtype=torch.int64, device=context.device)
    for rows, columns, z_TC in tiles(x, W, "bfloat16"):
        count[rows] += (z_TC + b[columns] > threshold).sum(1)
    context.check("encode_threshold, number of pairs", int(((indices >= 0).sum(1) != count).sum()), 0)
    least = values.masked_fill(indices < 0, torch.inf).amin()
    context.check("encode_threshold, values above it", float(least <= threshold), 0, width=values.shape[1])


def check_gathers(
    context: Context, values: torch.Tensor, indices: torch.Tensor, W: torch.Tensor, grad: torch.Tensor
) -> None:
    """``decode`` and ``dot_picks``, on rows in bfloat16 as in training."""
    options, rows = {"kernels": context.kernels}, some(len(values), context.device)
    rounded, g = W.bfloat16(), grad.bfloat16()
    result = decode(values, indices, rounded, **options)
    picked = rounded[indices[rows].clamp_min(0)].double() * (indices[rows] >= 0)[..., None]
    context.check("decode", relative(result[rows], (values[rows].double()[..., None] * picked).sum(1)), 1e-5)
    context.check("decode, nothing left out", int(result.isnan().sum()), 0)
    dots = dot_picks(g, indices, rounded, **options)
    context.check("dot_picks", relative(dots[rows], (g[rows].double()[:, None] * picked).sum(2)), 1e-5)
    context.check("dot_picks, nothing left out", int(dots.isnan().sum()), 0)


def check_gradients(
    context: Context,
    shape: Shape,
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    grad: torch.Tensor,
) -> None:
    """``row_grad``, the norm and the update, for both matrices, with further rows as AuxK gives them."""
    options, device = {"kernels": context.kernels}, context.device
    rows, order = grad.bfloat16(), PairOrder(indices, shape.d_latent)
    result = grad_of_rows(values, indices, rows, shape.d_latent, order, **options)
    again = grad_of_rows(values, indices, rows, shape.d_latent, PairOrder(indices, shape.d_latent), **options)
    context.check("row_grad, the same bits twice", float(not torch.equal(result, again)), 0)
    del again
    latents = torch.unique(torch.cat([some(shape.d_latent, device), torch.tensor([DENSE], device=device)]))
    truth = torch.stack([latent_gradient(values, indices, rows, int(latent)) for latent in latents])
    context.check("row_grad", relative(result[latents], truth), 1e-5)
    dense = relative(result[DENSE : DENSE + 1], latent_gradient(values, indices, rows, DENSE)[None])
    context.check("row_grad of a latent that fires on every token", dense, 1e-5)
    extra_R = torch.arange(0, shape.d_latent, 64, device=device)
    extra = torch.randn(len(extra_R), shape.d_model, device=device)
    result.index_add_(0, extra_R, extra)
    truth += torch.where((latents % 64 == 0)[:, None], extra[(latents // 64).clamp_max(len(extra) - 1)], 0)
    square = float(result.double().square().sum()) if result.numel() < 1 << 30 else float(result.norm()) ** 2
    del result
    for unit_rows in (False, True):
        gradient = PairGradient()
        gradient.add(values, indices, order, rows)
        gradient.add_rows(extra_R, extra)
        norm = float(gradient.squared_norm(W, **options))
        context.check(f"pair_norm, unit_rows={unit_rows}", abs(norm / square - 1), 1e-4)
        weight, first, second = W.clone(), 0.1 * W, 0.01 * W.square()
        clip = torch.tensor(0.5, device=device)
        adam = AdamStep(1e-3, (0.9, 0.999), 1e-8, step=7, clip=clip, unit_rows=unit_rows)
        gradient.update(weight, first, second, adam, **options)
        w, m, v = (tensor[latents].double() for tensor in (W, 0.1 * W, 0.01 * W.square()))
        g = 0.5 * truth
        if unit_rows:
            g = g - (g * w).sum(1, keepdim=True) * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        w = w - 1e-3 * (m / adam.corrections[0]) / ((v / adam.corrections[1]).sqrt() + 1e-8)
        if unit_rows:
            w /= w.norm(dim=1, keepdim=True)
            length = float((weight.norm(dim=1) - 1).abs().max())
            context.check("pair_update, rows of norm 1", length, 2e-6)
        for name, new, wanted in (("weight", weight, w), ("first", first, m), ("second", second, v)):
            context.check(f"pair_update, {name}, unit_rows={unit_rows}", relative(new[latents], wanted), 1e-4)
            context.check(f"pair_update, {name}, no NaN", int(new.isnan().sum()), 0)


def latent_gradient(values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, latent: int) -> torch.Tensor:
    """One row of the gradient in float64."""
    weight_N = (values.double() * (indices == latent)).sum(1)
    picked = weight_N.nonzero().squeeze(1)
    return weight_N[picked] @ rows[picked].double()


def check_nothing_fires(context: Context, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> None:
    """A bias of minus infinity: padding alone, and zeros from it."""
    x, b = x[:4], torch.full_like(b, -torch.inf)
    values, indices = encode_topk(x, W, b, 4, compute=Compute(context.kernels, "bfloat16"))
    context.check("nothing fires: padding", int((indices != -1).sum() + (values != 0).sum()), 0)
    decoded = decode(values, indices, W, kernels=context.kernels)
    context.check("nothing fires: zeros", float(decoded.abs().max()), 0)


def check_sums(context: Context, values: torch.Tensor, indices: torch.Tensor, num_latents: int) -> None:
    """Sums by latent, as an evaluation makes them: one latent is named by every token."""
    flat, x = indices.flatten(), values.flatten().double()
    sums = [torch.zeros(num_latents, dtype=torch.float64, device=x.device) for _ in range(3)]
    for into in sums:
        add_at(into, flat, x)
    same = all(torch.equal(sums[0], other) for other in sums[1:])
    context.check("add_at, the same bits three times", float(not same), 0)
    truth = torch.zeros(num_latents, dtype=torch.float64).index_add_(0, flat.cpu(), x.cpu())
    context.check("add_at", relative(sums[0].cpu(), truth), 1e-12)
