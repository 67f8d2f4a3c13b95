"""What the supervised scores find. Formulas and what they mean: docs/supervised_scores.md."""

from dataclasses import dataclass

from stage_eval.results.figures import Figure, Interval
from stage_eval.results.record import Record

HEADLINE = 20


@dataclass(frozen=True, kw_only=True)
class Ranged(Record):
    """A figure with its 95 % interval over documents."""

    value: Figure
    interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class Probes(Record):
    """Balanced accuracies on documents that had no part in the fit; 0.5 is chance."""

    latents: dict[str, Ranged]
    """By the number of latents that the probe sees: 1, 2, 5."""
    coordinates: dict[str, Ranged]
    """A control: coordinates of the activation in the place of latents, chosen alike."""
    activation: Ranged
    """A control: a probe on the whole activation."""
    token: Ranged
    """A control: what the token alone says, without any activation."""


@dataclass(frozen=True, kw_only=True)
class Absorption(Record):
    """What a concept's own latents leave to others, of the examples that a probe on the whole activation finds."""

    full: Ranged
    """Share on which all main latents are silent and another makes up the probe's projection. Lower is better."""
    fraction: Ranged
    """Mean share of the projection that others took over. Lower is better."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ConceptFigures(Record):
    """How the latents hold one concept."""

    concept: str
    meaning: str
    examples: tuple[int, int]
    """Drawn to fit on, and to score on; about as many other tokens."""
    documents: int
    """That the examples to score on are of."""
    best: list[int]
    """Latents by the difference of their means, the largest first."""
    probes: Probes
    main: list[int]
    """Latents that the concept is split into, in the order in which they were chosen."""
    split: Ranged
    """Their number; its interval is over the documents that they were chosen on."""
    f1: Ranged
    """Of a probe on the main latents, at equal classes."""
    absorption: Absorption | None
    """None where the main latents find too little of the concept to say what they miss, or latents write no row."""


@dataclass(frozen=True, kw_only=True)
class KindFigures(Record):
    """What is lost when the latents of one kind of token are ablated, by the number of latents."""

    kind: str
    accuracy: Ranged
    """Of the probe of this kind before."""
    own: list[Ranged]
    """Balanced accuracy lost by the probe of this kind."""
    others: list[Ranged]
    """The same of all other kinds, on average."""


@dataclass(frozen=True, kw_only=True)
class Perturbation(Record):
    """Targeted probe perturbation: 1 where each kind has latents of its own, 0 where nothing or everything is lost."""

    ablated: list[int]
    """How many latents."""
    score: list[Ranged]
    """Mean over kinds of what the own probe loses less what the others lose."""
    random: list[Ranged]
    """A control: as many latents at random among those that fire."""
    kinds: list[KindFigures]


@dataclass(frozen=True, kw_only=True)
class PairFigures(Record):
    """A probe for one label that learnt another instead, and how well ablation mends it."""

    target: str
    spurious: str
    clean: Ranged
    """Accuracy of a probe that was fitted where the two labels are independent."""
    biased: Ranged
    """Of one that was fitted where they always agree; on the same tokens, where they are independent."""
    score: list[Ranged]
    random: list[Ranged]


@dataclass(frozen=True, kw_only=True)
class Removal(Record):
    """Spurious correlation removal: the share of what a biased probe lacks that ablating its other label gives back."""

    ablated: list[int]
    score: list[Ranged]
    """Mean over pairs."""
    random: list[Ranged]
    """A control: as many latents at random among those that fire."""
    pairs: list[PairFigures]


@dataclass(frozen=True, kw_only=True)
class SupervisedFigures(Record):
    """What the latents say of labels that Python's own tokenizer gives."""

    seed: int
    """Of the halves of the documents, the draw of tokens, the random latents and the resamples."""
    most: int
    """Tokens that were drawn of each kind and half at most."""
    resamples: int
    tokens: int
    documents: tuple[int, int]
    """Fitted on, and scored on."""
    probes: Probes | None
    """Means over the concepts."""
    split: Ranged | None
    absorbed: Ranged | None
    """Mean over concepts of the full absorption."""
    absorbed_fraction: Ranged | None
    concepts: list[ConceptFigures]
    perturbation: Perturbation | None
    removal: Removal | None
    left_out: dict[str, str]
    """What could not be scored, and why."""


def headline_place(ablated: list[int]) -> int:
    """Which point of a curve is its headline: that of `HEADLINE` ablated latents, or of the next smaller number."""
    return max((place for place, count in enumerate(ablated) if count <= HEADLINE), default=0)


@dataclass(frozen=True, kw_only=True)
class SupervisedOutline(Record):
    """The headlines of the supervised scores."""

    latents_1: Ranged
    """Balanced accuracy of probes that see one latent, mean over concepts."""
    latents_5: Ranged
    activation: Ranged
    """Of probes on the whole activation."""
    split: Ranged
    absorbed: Ranged | None
    absorbed_fraction: Ranged | None
    ablated: int
    """Latents that are ablated for the two that follow."""
    perturbation: Ranged | None
    removal: Ranged | None

    @classmethod
    def of(cls, figures: SupervisedFigures) -> "SupervisedOutline | None":
        """None where no concept could be scored."""
        if figures.probes is None or figures.split is None:
            return None
        curves = [one for one in (figures.perturbation, figures.removal) if one is not None]
        place = headline_place(curves[0].ablated) if curves else 0
        return cls(
            latents_1=figures.probes.latents["1"],
            latents_5=figures.probes.latents["5"],
            activation=figures.probes.activation,
            split=figures.split,
            absorbed=figures.absorbed,
            absorbed_fraction=figures.absorbed_fraction,
            ablated=curves[0].ablated[place] if curves else 0,
            perturbation=figures.perturbation.score[place] if figures.perturbation is not None else None,
            removal=figures.removal.score[place] if figures.removal is not None else None,
        )
