"""Texts that the language model writes while one latent is held at a large value, and those it writes without.

Both go on from the same beginnings of texts, drawn with the same random numbers, so that they differ by the latent
alone. The same latent, beginnings and seed give the same texts. Legend: N beginnings, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.basics.errors import GranaryError
from shared.latents.examples import Example
from shared.latents.folder import Latents

BEGINNING = 8  # tokens of a text that are given
WRITTEN = 32  # tokens that the model goes on with


class NoSteeringError(GranaryError):
    """The model can't be steered by this latent, or not so strongly."""


@dataclass(frozen=True)
class Pair:
    """What the model wrote behind one beginning."""

    beginning: str
    clean: str
    steered: str


@dataclass
class Steering:
    """The model and the dictionary of a latents folder; they are loaded when the first text is asked for.

    Raises GranaryError where they are not to be found.
    """

    latents: Latents
    strength: float
    """Times the latent's largest activation."""
    seed: int
    model: str | None = None
    """None: where the folder says, as for `dictionary`."""
    dictionary: Path | None = None

    def __post_init__(self) -> None:
        from stage_inspect.explorer.live import Live, LiveSettings

        self._live = Live(self.latents, LiveSettings.find(self.latents, self.model, self.dictionary, "--subject"))

    @property
    def record(self) -> dict[str, Any]:
        """What decides the texts beside the latent and the beginnings."""
        return {"strength": self.strength, "beginning_tokens": BEGINNING, "written_tokens": WRITTEN}

    def pairs(self, latent: int, examples: Sequence[Example]) -> list[Pair]:
        """One for each example that has `BEGINNING` tokens.

        Raises NoSteeringError, and GranaryError for a model or dictionary that is not the folder's.
        """
        import torch

        from shared.intervene.edits import Edit

        live = self._live
        if not live.can_steer:
            raise NoSteeringError(
                "the dictionary has sites that are no places of one model: it can't be spliced into it"
            )
        bos, eos = live.tokenizer.bos_token_id, live.tokenizer.eos_token_id
        heads = [one.tokens[:BEGINNING].tolist() for one in examples if len(one.tokens) >= BEGINNING]
        if not heads:
            return []
        ids_NT = torch.tensor([([] if bos is None else [bos]) + head for head in heads])
        value = self.strength * float(self.latents.table["max"][latent])
        written = []
        for edits in ([], [Edit([latent], "set", value)]):
            spliced = live.spliced(edits)
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self.seed)
                    full_NT = spliced.generate(
                        ids_NT, max_new_tokens=WRITTEN, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                        pad_token_id=0 if eos is None else eos,
                    )  # fmt: skip
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise NoSteeringError("the steered model gives no finite probabilities: lower --steer") from None
            written.append(live.tokenizer.batch_decode(full_NT[:, ids_NT.shape[1] :], skip_special_tokens=True))
        begun = live.tokenizer.batch_decode(ids_NT, skip_special_tokens=True)
        return [Pair(*texts) for texts in zip(begun, *written, strict=True)]
