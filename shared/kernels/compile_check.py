"""Compile every Triton kernel, in every configuration used, for sm_80 and sm_90, on a machine without a GPU.

    python -m shared.kernels.compile_check

Prints one line per kernel (``--table``: a Markdown table) and exits with status 1 if one does not compile, does not fit
or spills registers. The interpreter shows that a kernel computes the right thing; this shows what the compiler made of
it: registers, shared memory, how many programs fit on a multiprocessor, and the length of the machine code.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shared.kernels.cubin import Resources, resources

ARCHITECTURES = (80, 90)
D_MODELS = (64, 768, 4096, 5120)
KS = (1, 64, 128, 512, 2048)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TYPES = tuple(DTYPES)
LAUNCH_OPTIONS = {"num_warps", "maxnreg"}


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel in one configuration. `types` maps runtime arguments to triton types, `constants` the constexprs."""

    label: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, int | bool]
    options: Mapping[str, int] = field(default_factory=dict)
    multiples_of_16: Sequence[str] = ("D", "num_columns", "z_stride")
    """Integers that are; for these the JIT compiles a form of its own, with wide loads."""


def cases(d_models: Sequence[int], ks: Sequence[int], types: Sequence[str], architecture: int = 90) -> Iterator[Case]:
    """Every kernel of the package with the block sizes its launcher chooses for these widths, ks and matrix types."""
    from triton import next_power_of_2

    from shared.kernels.decode import triton as decode
    from shared.kernels.encode_threshold import triton as threshold
    from shared.kernels.encode_topk import triton as encode
    from shared.kernels.pair_update import triton as pair
    from shared.kernels.row_grad import triton as grad
    from shared.kernels.row_update import triton as update

    pair_types = {"z_ptr": "*fp32", "num_columns": "i32", "z_stride": "i32"}
    emit_types = {"count_ptr": "*i64", "end_ptr": "*i64", "values_ptr": "*fp32"}
    emit_types |= dict.fromkeys(("capacity", "first_row", "first_column"), "i32")
    for batch in (False, True):
        constants = {"BATCH": batch, "BLOCK": threshold.BLOCK_COLUMNS}
        places = dict.fromkeys(("rows_ptr", "latents_ptr"), "*i64" if batch else "*i32")
        for bias in types:
            common = pair_types | {"b_ptr": f"*{bias}", "bar_ptr": "*fp32"}
            yield Case(f"count batch={batch} {bias}", threshold._count, common | {"count_ptr": "*i64"}, constants)
            yield Case(f"emit batch={batch} {bias}", threshold._emit, common | emit_types | places, constants)
    for k in ks:
        config = encode.select_config(k, encode.BLOCK_COLUMNS)
        state = {"keys_ptr": "*i64", "count_ptr": "*i32"}
        select_types = state | {"z_ptr": "*fp32", "bar_ptr": "*fp32"}
        select_types |= dict.fromkeys(("num_columns", "first_column", "z_stride", "k"), "i32")
        for bias in types:
            yield _tuned_case(f"select k={k} {bias}", encode._select, select_types | {"b_ptr": f"*{bias}"}, config)
        unpack_types = state | {"values_ptr": "*fp32", "indices_ptr": "*i64", "k": "i32"}
        yield _tuned_case(f"unpack k={k}", encode._unpack, unpack_types, encode.unpack_config(k, config))

    for d in d_models:
        for weights in (f"*{name}" for name in types):
            label = f"d={d} {weights[1:]}"
            picks = {"indices_ptr": "*i64", "W_ptr": weights, "out_ptr": "*fp32", "K": "i32", "D": "i32"}
            decode_types = picks | {"values_ptr": "*fp32"}
            yield _tuned_case(f"decode {label}", decode._decode, decode_types, decode.decode_config(d))
            residual_types = decode_types | dict.fromkeys(("target_ptr", "b_ptr", "weight_ptr"), "*fp32")
            residual_types |= dict.fromkeys(("metric_ptr", "sums_ptr"), "*fp32")
            yield _tuned_case(f"residual {label}", decode._residual, residual_types, decode.decode_config(d))
            left_types = {"left_ptr": "*fp32", "weight_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": weights}
            left_types |= {"sums_ptr": "*fp32", "N": "i32", "D": "i32"}
            rows = {"ROWS": decode.GRAD_ROWS, "BLOCK_D": min(512, next_power_of_2(d))}
            yield Case(f"residual_grad {label}", decode._residual_grad, left_types, rows)
            for grads in {"*fp32", weights}:
                dot_types = picks | {"grad_ptr": grads}
                yield _tuned_case(f"dot_picks {label} {grads[1:]}", decode._dot_picks, dot_types, decode.dot_config(d))
            walk_types = {
                "coefficients_ptr": "*fp32", "tokens_ptr": "*i32", "offsets_ptr": "*i64", "rows_ptr": weights,
                "chunks_ptr": "*fp32", "D": "i32",
            }  # fmt: skip
            chunk = {"CHUNK": grad.CHUNK}
            grad_types = walk_types | {"out_ptr": "*fp32"}
            yield _tuned_case(f"row_grad {label}", grad._row_grad, grad_types, grad.config_for(d) | chunk)
            sum_types = grad_types | {"order_ptr": "*i64", "indices_ptr": "*i64"}
            yield _tuned_case(f"chunk_sums {label}", grad._chunk_sums, sum_types, grad.config_for(d) | chunk)
            pair_types = grad_types | {"slot_ptr": "*i32", "extra_ptr": "*fp32"}
            for num_rows in (8192, 32768):
                config = pair.norm_config(d, num_rows, DTYPES[weights[1:]]) | chunk
                yield _tuned_case(f"pair_norm {label} N={num_rows}", pair._pair_norm, pair_types, config)
            for unit_rows in (False, True):
                config = pair.update_config(d, unit_rows, DTYPES[weights[1:]], architecture=architecture)
                config |= {"UNIT_ROWS": unit_rows} | chunk
                for moments in ("fp32", "bf16"):
                    case_types = pair_types | _adam_types(f"*{moments}")
                    name = f"pair_update {label} unit_rows={unit_rows} moments {moments}"
                    yield _tuned_case(name, pair._pair_update, case_types, config)
            yield from _transform_cases(d, weights)
        for moments in ("*fp32", "*bf16"):
            update_types = _adam_types(moments) | {"grad_ptr": "*fp32", "D": "i32"}
            for unit_rows in (False, True):
                block = update.block_d(d, unit_rows)
                yield Case(
                    f"row_update d={d} moments {moments[1:]} unit_rows={unit_rows}",
                    update._row_update,
                    update_types,
                    {"UNIT_ROWS": unit_rows, "BLOCK_D": block},
                    {"num_warps": update.num_warps_for(block)},
                )
    sum_types = {"coefficients_ptr": "*fp32", "offsets_ptr": "*i64", "out_ptr": "*fp32"}
    yield Case("latent_sum", grad._latent_sum, sum_types, {"BLOCK_P": grad.SUM_BLOCK_P})


def _transform_cases(d_model: int, weights: str) -> Iterator[Case]:
    from shared.kernels.transform_decode import triton as transform

    types = dict.fromkeys(("latents_ptr", "firsts_ptr", "lasts_ptr", "offsets_ptr", "starts_ptr"), "*i64")
    types |= dict.fromkeys(("h_ptr", "values_ptr", "out_ptr"), "*fp32")
    types |= {"tokens_ptr": "*i32", "rows_ptr": weights, "W_ptr": weights}
    types |= dict.fromkeys(("D", "H", "first_column", "num_columns"), "i32")
    for kernel in (transform._project, transform._expand, transform._outer):
        label = f"transform{kernel.fn.__name__} d={d_model} {weights[1:]}"
        yield _tuned_case(label, kernel, types, transform.block_config(d_model, DTYPES[weights[1:]]))


def _adam_types(moments: str) -> dict[str, str]:
    types = {"weight_ptr": "*fp32", "clip_ptr": "*fp32", "first_ptr": moments, "second_ptr": moments}
    names = ("lr", "beta1", "rest1", "beta2", "rest2", "eps", "correction1", "correction2")
    return types | dict.fromkeys(names, "fp32") | {"step": "i32"}


def _tuned_case(label: str, kernel: Any, types: Mapping[str, str], config: Mapping[str, int]) -> Case:
    constants = {name: value for name, value in config.items() if name not in LAUNCH_OPTIONS}
    return Case(label, kernel, types, constants, {name: config[name] for name in LAUNCH_OPTIONS & config.keys()})


def compile_case(case: Case, architecture: int, may_spill: int = 0) -> Resources:
    """Compile to a cubin; returns what it needs. Raises RuntimeError when it does not fit, or spills more bytes."""
    cubin, shared = compile_to_cubin(case, architecture)
    needs = resources(cubin, case.options.get("num_warps", 4), shared)
    if needs.spilled > may_spill:
        raise RuntimeError(f"spills {needs.spilled} bytes per thread: {needs.registers} registers are not enough")
    if needs.programs(architecture) == 0:
        raise RuntimeError(f"does not fit on sm_{architecture}: {needs}")
    return needs


def compile_to_cubin(case: Case, architecture: int) -> tuple[bytes, int]:
    """The machine code, and the bytes of shared memory that its launch asks for."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name], constants[(position,)] = "constexpr", case.constants[name]
        else:
            signature[name] = case.types[name]
            if case.types[name].startswith("*") or name in case.multiples_of_16:  # what the JIT finds at the launch
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(case.options))
    return compiled.asm["cubin"], compiled.metadata.shared


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile all cases for all architectures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--d-model", type=int, nargs="*", default=D_MODELS)
    parser.add_argument("--k", type=int, nargs="*", default=KS)
    parser.add_argument("--types", nargs="*", default=TYPES, choices=TYPES)
    parser.add_argument("--only", nargs="*", help="kernels whose label starts with one of these")
    parser.add_argument("--architectures", type=int, nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--may-spill", type=int, default=0, help="bytes per thread that are no failure")
    parser.add_argument("--table", action="store_true", help="Markdown")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.stderr.write("error: unset TRITON_INTERPRET: the interpreter has no compiler\n")
        return 2
    if options.table:
        sys.stdout.write(HEAD)
    failures = 0
    for architecture in options.architectures:
        for case in cases(options.d_model, options.k, options.types, architecture):
            if options.only and not case.label.startswith(tuple(options.only)):
                continue
            try:
                needs = compile_case(case, architecture, options.may_spill)
                outcome = row(needs, architecture) if options.table else line(needs, architecture)
            except Exception as error:
                failures += 1
                outcome = f"FAILED: {error}"
            name = f"sm_{architecture} {case.label}"
            sys.stdout.write(f"| {name} | {outcome} |\n" if options.table else f"{name}: {outcome}\n")
            sys.stdout.flush()
    return 1 if failures else 0


HEAD = """\
| kernel | warps | registers | shared B | CTAs/SM | occupancy | instructions | barriers |
|---|---|---|---|---|---|---|---|
"""


def row(needs: Resources, architecture: int) -> str:
    """Cells of the table."""
    fits = f"{needs.programs(architecture)} | {needs.occupancy(architecture):.2f}"
    return f"{needs.warps} | {needs.registers} | {needs.shared} | {fits} | {needs.instructions} | {needs.barriers}"


def line(needs: Resources, architecture: int) -> str:
    """The same in words."""
    return (
        f"{needs.registers} registers, {needs.spilled} B spilled, {needs.shared} B shared, "
        f"occupancy {needs.occupancy(architecture):.2f}, {needs.instructions} instructions, {needs.barriers} barriers"
    )


if __name__ == "__main__":
    sys.exit(main())
