"""What the plan is told beside training's own configuration."""

from dataclasses import dataclass, fields

from omegaconf import OmegaConf

from shared.basics.errors import GranaryError
from shared.basics.field_docs import docs


@dataclass(kw_only=True)
class PlanSchema:
    """Options of ``python -m stage_train.plan``, with their defaults."""

    d_model: int | None = None
    """Width of the activations, to plan without a store; null: from store.url."""
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
    json: bool = False
    """Print one JSON object in place of the table."""


NAMES = frozenset(field.name for field in fields(PlanSchema))
HELP = """\
usage: {program} key=value ...

What the training run with these overrides will need, on every rank: memory, reading, time. Nothing is
trained or written. Beside training's own keys:

"""


def help_text(program: str) -> str:
    """The options with their meanings and defaults; `program` is how the plan is started."""
    meanings = docs(PlanSchema)
    lines = (f"  {field.name:<15} {meanings[field.name]} [{field.default}]" for field in fields(PlanSchema))
    return HELP.format(program=program) + "\n".join(lines)


def split_overrides(arguments: list[str]) -> tuple[PlanSchema, list[str]]:
    """The plan's own options, and what is left: overrides of training. Hydra's own keys say nothing about a run.

    Raises GranaryError for a number that makes no sense.
    """
    own = [argument for argument in arguments if argument.partition("=")[0].lstrip("+") in NAMES]
    others = [argument for argument in arguments if argument not in own and not argument.startswith("hydra")]
    options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PlanSchema), OmegaConf.from_dotlist(own)))
    assert isinstance(options, PlanSchema)
    if not 0 <= options.dead_fraction <= 1:
        raise GranaryError(f"dead_fraction={options.dead_fraction}: a share of the latents, between 0 and 1")
    for name, value in vars(options).items():
        if type(value) in (int, float) and not value > 0 and name != "dead_fraction":
            raise GranaryError(f"{name}={value}: must be above 0")
    return options, others
