"""How an operation computes: the one argument about it that callers hand down."""

from dataclasses import dataclass

from shared.kernels.dispatch import KERNELS

COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Compute:
    """Which implementation runs, and in what type its dense products. Raises ValueError for unknown names."""

    kernels: str = "auto"
    """auto, triton, torch or reference; see ``shared.kernels.dispatch.resolve``."""
    dtype: str = "float32"
    """float32 or bfloat16; what that means on each device says the operation's docstring."""

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("kernels", self.kernels, KERNELS),
            ("compute_dtype", self.dtype, COMPUTE_DTYPES),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: choose from {', '.join(choices)}")


AUTO = Compute()
