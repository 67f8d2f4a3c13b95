"""Ceilings on what one command may spend: tokens, and money at given prices.

What a request may cost at most is set aside before it is sent, and what it did cost replaces that when it is answered:
requests side by side can't pass a ceiling together.
"""

import threading
from dataclasses import dataclass

from shared.basics.errors import GranaryError
from stage_inspect.explain.endpoint.request import Request, Usage

MILLION = 1_000_000


class CeilingError(GranaryError):
    """The next request could pass a ceiling. All answers until here are kept."""


@dataclass(frozen=True)
class Ceilings:
    """None: no ceiling."""

    tokens: int | None = None
    money: float | None = None
    price_read: float = 0.0
    """Of a million tokens that the model reads."""
    price_written: float = 0.0

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise GranaryError(f"--max-tokens {self.tokens}: at least 1")
        for name, value in (("cost", self.money), ("price-in", self.price_read), ("price-out", self.price_written)):
            if value is not None and not 0 <= value < float("inf"):
                raise GranaryError(f"--{'max-' * (name == 'cost')}{name} {value}: a number of at least 0")
        if self.money is not None and not self.price_read + self.price_written:
            raise GranaryError("--max-cost needs --price-in and --price-out, per million tokens")

    def cost(self, usage: Usage) -> float:
        """Money for these tokens."""
        return (usage.read * self.price_read + usage.written * self.price_written) / MILLION


class Budget:
    """What was spent and what is set aside. Safe to use from several threads."""

    def __init__(self, ceilings: Ceilings) -> None:
        self.ceilings = ceilings
        self.requests, self.reused, self.tokens, self.money = 0, 0, 0, 0.0
        self.is_reached = False
        self._aside_tokens, self._aside_money = 0, 0.0
        self._lock = threading.Lock()

    def set_aside(self, request: Request) -> Usage:
        """Raises CeilingError where this request could pass a ceiling; else returns what was set aside for it."""
        most = Usage(request.most_tokens - request.written_tokens, request.written_tokens)
        tokens, money = request.most_tokens, self.ceilings.cost(most)
        with self._lock:
            limits = self.ceilings
            over_tokens = limits.tokens is not None and self.tokens + self._aside_tokens + tokens > limits.tokens
            over_money = limits.money is not None and self.money + self._aside_money + money > limits.money
            if over_tokens or over_money or self.is_reached:
                self.is_reached = True
                raise CeilingError(
                    f"the ceiling {'of tokens' if not over_money else 'on cost'} is reached after {self.told()}: "
                    "all answers are kept, and the same command goes on from them"
                )
            self._aside_tokens += tokens
            self._aside_money += money
        return most

    def settle(self, aside: Usage, cost: Usage | None) -> None:
        """The request is over: it cost this much, or (None) nobody knows: then what was set aside."""
        real = aside if cost is None else cost
        with self._lock:
            self._aside_tokens -= aside.read + aside.written
            self._aside_money -= self.ceilings.cost(aside)
            self.requests += 1
            self.tokens += real.read + real.written
            self.money += self.ceilings.cost(real)

    def reuse(self) -> None:
        """An answer was there already."""
        with self._lock:
            self.reused += 1

    def told(self) -> str:
        """What was spent, in words."""
        price = (
            f", {self.money:.4f} at the prices given" if self.ceilings.price_read + self.ceilings.price_written else ""
        )
        return f"{self.requests:,} requests and {self.tokens:,} tokens{price}"
