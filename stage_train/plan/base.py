"""The frozen base model that shares a rank's device with the run, where one is named."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shared.basics.errors import GranaryError
from stage_train.plan.config import PlanSchema
from stage_train.plan.memory import Memory

if TYPE_CHECKING:
    from shared.lm.base_memory import BaseMemory


@dataclass(frozen=True)
class Base:
    """What is named, and its memory; None where nothing is."""

    name: str
    ranks: int
    """That share its weights."""
    memory: "BaseMemory | None"

    def beside(self, memory: Memory) -> Memory:
        """The run's memory with the base in it."""
        if self.memory is None:
            return memory
        blocks = {
            "frozen base: parts of split weights": self.memory.split,
            "frozen base: embedding and norms, whole": self.memory.whole,
            "frozen base: beside its text stack, whole": self.memory.tower,
        }
        return replace(memory, total=memory.total + self.memory.total, blocks={**memory.blocks, **blocks})

    def lines(self) -> list[str]:
        """What the table says of it."""
        if self.memory is None:
            return []
        return [
            f"base: {self.name}, {self.memory.layers} of {self.memory.of_layers} layers, split over {self.ranks} ranks"
        ]


def find_base(cfg: PlanSchema, ranks: int) -> Base:
    """Memory of the configured base on each of `ranks`. Raises GranaryError where it can't be had, cut or split so."""
    if cfg.base is None:
        return Base("", ranks, None)
    from shared.lm.base_memory import base_memory  # brings transformers, whose memory is none of training's

    shared = cfg.base_tensor_parallel or ranks
    if ranks % shared:
        raise GranaryError(f"base_tensor_parallel={shared} does not divide the {ranks} ranks")
    found = base_memory(cfg.base, layer=cfg.base_layer, tensor_parallel=shared, dtype=cfg.base_dtype)
    return Base(cfg.base, shared, found)
