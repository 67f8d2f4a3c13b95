"""Supervised scores of every dictionary of an evaluation, on tokens that are drawn and read once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from shared.basics.errors import GranaryError
from shared.latents.vocabulary import Vocabulary
from shared.lm.recorded import recorded_vocabulary
from shared.sae.sites import Sites
from stage_eval.config import EvalSchema
from stage_eval.measure.session import Loaded, Session
from stage_eval.results.supervised import SupervisedFigures
from stage_eval.supervised.gather import gather
from stage_eval.supervised.material import Material
from stage_eval.supervised.sample import LEAST, Sample, draw
from stage_eval.supervised.score import score


@dataclass
class Labelled:
    """The drawn tokens, and what has been read of them."""

    sample: Sample
    seed: int
    most: int
    _materials: dict[Sites, Material] = field(default_factory=dict)

    @classmethod
    def draw(cls, cfg: EvalSchema, session: Session) -> Self:
        """Draw the tokens; raises GranaryError where the store's text has no labels, or too few."""
        if cfg.supervised_examples < LEAST:
            raise GranaryError(f"supervised_examples={cfg.supervised_examples}: it must be at least {LEAST}")
        vocabulary = Vocabulary.of(*recorded_vocabulary(cfg.model, session.store))
        sample = draw(session.store, session.data, vocabulary, cfg.seed, cfg.supervised_examples)
        return cls(sample, cfg.seed, cfg.supervised_examples)

    def figures(self, loaded: Sequence[Loaded], session: Session) -> list[SupervisedFigures]:
        """Those of each dictionary; none but on rank 0. Every rank must call it."""
        wanted = [one.sites for one in loaded if one.sites not in self._materials]
        read = gather(self.sample, list(dict.fromkeys(name for sites in wanted for name in sites.names)), session)
        for sites in wanted:
            x_ND, y_ND = sites.pick(read)
            self._materials[sites] = Material(self.sample, x_ND, y_ND, self.seed, session.world.device)
        if not session.world.is_main:
            return []
        return [score(one.dictionary, self._materials[one.sites], self.most) for one in loaded]
