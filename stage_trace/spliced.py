"""The replacement model on the prompt itself: every stand-in in its place, and what the model then says.

Each dictionary encodes what those before it have made of the stream, nothing is corrected by errors, and attention and
norms answer freely, a Lorsa's patterns too. What it loses here the graph has as errors. Layers without a dictionary and
fixed positions keep what the model's own modules add. Shapes: T positions, N of them scored, D width of the stream.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.lm.frozen import run
from shared.lm.hookpoint import HookPoint
from shared.lm.next_token import VocabularyHead, score_next_tokens
from stage_trace.active import active
from stage_trace.replacement import own_part
from stage_trace.session import Session


@dataclass(frozen=True, slots=True)
class Spliced:
    """Scores of the replacement model against the model, over the positions that are not fixed."""

    kl: float
    """Mean KL(model || replacement model) of the next token, in nats."""
    kl_last: float
    """The same at the last position, whose logits the graph explains."""
    agreeing: int
    """Positions at which both say the same token."""
    positions: int
    loss: float | None
    """Mean cross-entropy, in nats, of those tokens of the prompt that such a position predicts; None for none."""
    loss_of_model: float | None
    said: int
    """The token that it finds likeliest at the end of the prompt."""
    probability: float
    """What it gives that token."""


@torch.no_grad()
def splice_all(session: Session) -> Spliced:
    """Run the replacement model of a recorded prompt, and compare."""
    pending: dict[HookPoint, Tensor] = {}  # what latents add, by the output that they write
    fixed_T = session.replacement.fixed_T

    def change(output: HookPoint, added_TD: Tensor, sites: dict[HookPoint, Tensor]) -> Tensor | None:
        if output not in session.sources:
            return None
        source, number = session.sources[output]
        dictionary, place = source.open(), source.places[number]
        x_TD = sites[place.read]
        latents = active(dictionary, source.rows(dictionary)[number], number, place, x_TD, fixed_T)
        for written in latents.writes:
            written_TD = latents.written(written, x_TD)
            pending[written] = pending[written] + written_TD if written in pending else written_TD
        part = own_part(dictionary, number, latents)
        replaced_TD = pending[output] + part.bias_D
        if part.skip is not None:
            replaced_TD = replaced_TD + x_TD @ part.skip.T
        return torch.where(fixed_T[:, None], added_TD, replaced_TD)

    reads = [source.places[number].read for source, number in session.sources.values()]
    after = run(session.model, session.parts, session.tokens_T, [*reads, *session.sources], change=change)
    free = torch.nonzero(~fixed_T).flatten()
    head = VocabularyHead(session.model)
    hidden = [one.final_TD[free] for one in (session.recording, after)]
    scores = score_next_tokens(head, hidden, session.tokens_T.roll(-1)[free])
    has_next = free + 1 < len(session.tokens_T)  # the last position predicts no token of the prompt
    losses = scores.cross_entropy_QN[:, has_next].mean(1).tolist() if bool(has_next.any()) else [None, None]
    last = torch.softmax(head(after.final_TD[-1:])[0], -1)
    last_kl = scores.kl_QN[1, -1] if not bool(fixed_T[-1]) else torch.tensor(0.0)
    return Spliced(
        kl=float(scores.kl_QN[1].mean()), kl_last=float(last_kl), agreeing=int(scores.agrees_QN[1].sum()),
        positions=len(free), loss=losses[1], loss_of_model=losses[0],
        said=int(last.argmax()), probability=float(last.max()),
    )  # fmt: skip
