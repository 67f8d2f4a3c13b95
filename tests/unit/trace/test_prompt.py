"""Tokens of a prompt, and the positions that no dictionary was taught."""

import logging

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.lm import load_tokenizer
from stage_trace.prompt import encode, fixed_positions
from stage_trace.targets import Logits

TOKENIZER = load_tokenizer("bundled")


def test_f45_bos_is_put_before_a_text_and_missed_in_ids(caplog: pytest.LogCaptureFixture) -> None:
    """The bundled model's BOS is id 0, which is an id like any other."""
    ids, said = encode("def f", TOKENIZER)
    assert ids[0] == TOKENIZER.bos_token_id == 0
    assert said == "def f"
    assert encode(ids, TOKENIZER)[0] == ids
    with caplog.at_level(logging.WARNING):
        assert encode(ids[1:], TOKENIZER)[0] == ids[1:]
    assert "does not begin with BOS" in caplog.text


@pytest.mark.parametrize(("prompt", "told"), [("", "no token"), ([0], "no token"), ([0, 10**6], "outside")])
def test_what_is_no_prompt_is_refused(prompt: str | list[int], told: str) -> None:
    with pytest.raises(GranaryError, match=told):
        encode(prompt, TOKENIZER)


def test_f32_fixed_positions_follow_the_rule_of_a_harvest() -> None:
    """Special tokens wherever they stand, not the first position as such."""
    assert fixed_positions([0, 5, 1, 7], TOKENIZER).tolist() == [True, False, True, False]
    assert fixed_positions([5, 6], TOKENIZER).tolist() == [False, False]
    assert fixed_positions([0, 5, 6, 7], TOKENIZER, 3).tolist() == [True, True, True, False]
    with pytest.raises(GranaryError, match="not negative"):
        fixed_positions([0, 5], TOKENIZER, -1)


def test_logits_are_the_fewest_that_make_up_the_mass() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert Logits.choose(logits, 0.79, 10).tokens.tolist() == [0, 1]
    assert Logits.choose(logits, 0.81, 10).tokens.tolist() == [0, 1, 2]
    assert Logits.choose(logits, 0.95, 1).tokens.tolist() == [0]
    chosen = Logits.choose(logits, 0.95, 10, [3, 1])
    assert chosen.probabilities.tolist() == pytest.approx([0.05, 0.3])
    with pytest.raises(GranaryError, match="not in the vocabulary"):
        Logits.choose(logits, 0.95, 10, [4])
