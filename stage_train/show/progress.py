"""The bar that a user watches."""

import sys
from collections.abc import Mapping, Sequence

from tqdm import tqdm


class ProgressBar:
    """Tokens done, speed and ETA; loss, FVU, L0, dead share and waiting share as of the last logging step."""

    def __init__(self, total_tokens: int, done_tokens: int, *, enabled: bool) -> None:
        self._bar = tqdm(
            total=total_tokens,
            initial=done_tokens,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            smoothing=0.1,
            disable=not enabled,
        )

    def advance(self, tokens: int) -> None:
        """Count a batch."""
        self._bar.update(tokens)

    def show(self, metrics: Sequence[Mapping[str, float | int]]) -> None:
        """Show the figures of a logging step: one run's, or the span over several."""

        def span(name: str, form: str) -> str:
            values = [run[name] for run in metrics]
            low, high = f"{min(values):{form}}", f"{max(values):{form}}"
            return low if low == high else f"{low}-{high}"

        self._bar.set_postfix_str(
            f"loss {span('loss', '.4f')} FVU {span('fvu', '.4f')} L0 {span('l0', '.1f')} "
            f"dead {span('dead_fraction', '.1%')} wait {span('wait_share', '.0%')}",
            refresh=False,
        )

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
