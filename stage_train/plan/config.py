"""What the plan is told beside training's own configuration."""

from dataclasses import dataclass, fields

from shared.basics.errors import GranaryError
from stage_train.config import TrainSchema


@dataclass(kw_only=True)
class PlanSchema(TrainSchema):
    """Training's keys, and the plan's own with their defaults. Raises GranaryError for a number that makes no sense."""

    d_model: int | None = None
    """Width of the activations, to plan without a store; null: from store.url."""
    layers: int | None = None
    """Without a store: how many a pattern such as layers.*.mlp_in stands for."""
    seq_len: int = 4096
    """Positions per context, without a store."""
    store_dtype: str = "bfloat16"
    """As which activations will be stored, without a store."""
    nodes: int = 1
    """Machines, of nproc processes each."""
    memory_gib: float | None = None
    """What a rank may take: exit status 2 where it is not enough."""
    dead_fraction: float = 0.1
    """Share of dead latents that AuxK works on, in runs longer than sae.dead_after_tokens."""
    fullest_row: float = 4.0
    """batchtopk: picks of the fullest token, in k."""
    tokens_per_s: float | None = None
    """Speed of training, all ranks together, where it is known."""
    tflops: float | None = None
    """Speed of a rank's matrix products, to estimate the time from."""
    measure: bool = False
    """Time real steps of one rank's part on this machine."""
    disk_mb_s: float | None = None
    """What the store's disk or network delivers to one machine."""
    base: str | None = None
    """A frozen model on the same devices, as online=true has: folder with its config.json, or hub id; no weights."""
    base_layer: int | None = None
    """Behind which of its layers it is cut, counted from 0; null: not at all."""
    base_tensor_parallel: int | None = None
    """Ranks that share its weights; null: all."""
    base_dtype: str = "bfloat16"
    """Type of its weights."""
    json: bool = False
    """Print one JSON object in place of the table."""

    def __post_init__(self) -> None:
        if not 0 <= self.dead_fraction <= 1:
            raise GranaryError(f"dead_fraction={self.dead_fraction}: a share of the latents, between 0 and 1")
        for name in {*OWN, "nproc"} - {"dead_fraction", "base_layer"}:
            value = getattr(self, name)
            if type(value) in (int, float) and not value > 0:
                raise GranaryError(f"{name}={value}: must be above 0")


OWN = {field.name for field in fields(PlanSchema)} - {field.name for field in fields(TrainSchema)}
