"""What is known of each activation without making one: no torch, so that a configuration is checked at once."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ActivationKind:
    """How an activation comes by its sparsity."""

    fixes_l0: bool = False
    """k latents fire, per token or on average: the config needs k, and there is no sparsity penalty."""
    penalties: tuple[str, ...] = ()
    """Sparsity penalties that it can be trained with."""
    is_learnt: bool = True
    """Whether it can be trained here; else it is that of other projects' dictionaries, which are read."""


ACTIVATION_KINDS = {
    "topk": ActivationKind(fixes_l0=True),
    "batchtopk": ActivationKind(fixes_l0=True),
    "relu": ActivationKind(penalties=("l1", "tanh", "tanh_quad")),
    "jumprelu": ActivationKind(penalties=("l0", "tanh", "tanh_quad")),
    "gated": ActivationKind(penalties=("l1",)),
    "signed_topk": ActivationKind(fixes_l0=True, is_learnt=False),
}
