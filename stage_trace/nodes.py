"""The nodes of a graph and their names, one function for all of them."""

from dataclasses import dataclass
from enum import Enum

from shared.basics.errors import GranaryError
from shared.lm.hookpoint import HookPoint


class Kind(Enum):
    """What a node is."""

    feature = "feature"
    """A latent that fires at a position."""
    error = "error"
    """What an MLP, or attention, adds at a position beside its stand-in."""
    fixed = "fixed"
    """The whole output of an MLP, or of attention, at a position that no dictionary was taught."""
    bias = "bias"
    """All that a layer adds whatever it reads."""
    token = "token"
    """An embedded token of the prompt."""
    logit = "logit"
    """A token that the model may say next."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node; what does not apply to its kind is None."""

    kind: Kind
    layer: int
    """-1 for tokens, the number of layers for the final norm's bias, one more for logits."""
    position: int
    """0 for biases, which have none."""
    number: int
    """The latent of a feature, the id of a token or logit; else -1."""
    activation: float | None = None
    """A feature's value."""
    probability: float | None = None
    """A logit's."""
    text: str = ""
    """A token's or logit's."""
    is_first: bool = False
    """Of a logit: it is the likeliest."""
    influence: float | None = None
    """Share of all influence, of this node alone; None for logits."""
    cumulative: float | None = None
    """The share that this node and all more influential ones have."""
    site: str = "mlp_out"
    """Of a feature, an error or a fixed position: which output of its layer is stood in for there; ``attn_out`` where a
    Lorsa stands in for attention."""

    @property
    def output(self) -> HookPoint:
        """That output."""
        return HookPoint(self.layer, self.site)

    @property
    def is_attention(self) -> bool:
        """Whether it is of a Lorsa."""
        return self.site == "attn_out"

    @property
    def id(self) -> str:
        """Unique in a graph; those of transcoders' features, of tokens and logits are circuit-tracer's."""
        layer = f"A{self.layer}" if self.is_attention else str(self.layer)
        match self.kind:
            case Kind.feature | Kind.logit:
                return f"{layer}_{self.number}_{self.position}"
            case Kind.error:
                return f"{layer}_-1_{self.position}"
            case Kind.fixed:
                return f"{layer}_-2_{self.position}"
            case Kind.bias:
                return f"{self.layer}_-3_0"
            case Kind.token:
                return f"E_{self.number}_{self.position}"

    @property
    def label(self) -> str:
        """A few words for a reader."""
        match self.kind:
            case Kind.feature:
                return f"layer {self.layer}, {'attention ' if self.is_attention else ''}latent {self.number}"
            case Kind.error:
                return f"error of {'attention, ' if self.is_attention else ''}layer {self.layer}"
            case Kind.fixed:
                return f"{'attention' if self.is_attention else 'MLP'} {self.layer} at a fixed position"
            case Kind.bias:
                return f"biases of layer {self.layer}"
            case Kind.token:
                return f'token "{self.text}"'
            case Kind.logit:
                return f'Output "{self.text}" (p={self.probability:.3f})'


def cantor(layer: int, latent: int) -> int:
    """One number for both, as the field's feature pages are called: Cantor's pairing."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def uncantor(number: int) -> tuple[int, int]:
    """The (layer, latent) of ``cantor``; raises GranaryError for a negative number."""
    if number < 0:
        raise GranaryError(f"{number} is no feature's number")
    from math import isqrt

    diagonal = (isqrt(8 * number + 1) - 1) // 2
    latent = number - diagonal * (diagonal + 1) // 2
    return diagonal - latent, latent


def check_unique(nodes: list[Node]) -> None:
    """Raise ValueError if two nodes have one id, which would merge them in every reader."""
    ids = [node.id for node in nodes]
    if len(set(ids)) != len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise ValueError(f"two nodes are called {twice}")
