"""Steering a latent and asking a judge whether its explanation says what came of it: the bundled model, a planted
latent, and a stub that gives log probabilities."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.intervene.edits import Edit
from shared.intervene.splice import SplicedModel
from shared.latents.folder import Latents
from shared.latents.meta import META
from shared.lm import load_causal_lm, load_tokenizer, model_identity
from shared.sae import SAE
from shared.sae.config import SAEConfig
from shared.sae.sites import Sites
from stage_inspect.explain import language_command, steering
from stage_inspect.explain.examples import choose
from stage_inspect.explain.scores.intervention import BEFORE
from stage_inspect.explain.sides import Sides
from stage_inspect.explain.steering import NoSteeringError, Steering
from tests.endpoint import Body, Reply, Stub, stub
from tests.exploring import HOOK, opened_study
from tests.latents import synthetic_latents

LATENTS, PLANTED, OTHER = 16, 5, 6
WORD = "self"
SAID = {PLANTED: f"the word {WORD}", OTHER: "numbers"}
NATS = -0.5  # of each token of an explanation that the stub does not find in the text
FOUND = -0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE of the bundled model, one latent of which writes the direction of one token's logit."""
    home = tmp_path_factory.mktemp("intervention")
    sites = Sites.of(HOOK)
    config = SAEConfig(d_model=128, d_latent=LATENTS, activation="topk", k=3, normalisation="none", sites=sites)
    sae = SAE(config, generator=torch.Generator().manual_seed(0))
    model, tokenizer = load_causal_lm("bundled"), load_tokenizer("bundled")
    weight_VD = model.get_output_embeddings().weight.detach()
    row_D = weight_VD[tokenizer(WORD, add_special_tokens=False).input_ids[0]]
    # What raises that token's logit above all others', through the final norm's gains.
    row_D = torch.linalg.solve(weight_VD.T @ weight_VD, row_D) / model.base_model.norm.weight.detach()
    with torch.no_grad():
        sae.W_dec[PLANTED] = row_D / row_D.norm()
    sae.save_pretrained(home / "sae", {"model": {"id": "bundled"}, "hook": HOOK})
    synthetic_latents(home / "latents", LATENTS, top=20, sample=60, num_windows=3072)
    latents = opened_study(home, model=dict(model_identity("bundled")))
    (home / "latents" / META).write_bytes(latents.meta.to_bytes())
    latents.notes.add_explanations([(number, text, "person", "me", {}) for number, text in SAID.items()])
    return home


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "WRITTEN", 8)


def judge(_: Stub, __: str, body: Body) -> Reply:
    """A token of an explanation is likelier where the text has the word that the explanation ends with."""
    prompt = body["prompt"]
    head, _, text = prompt.partition("\n")
    text = text.partition("\n\nThe pattern")[0]
    start = len(BEFORE.format(text))
    words = [(found.start(), found.group()) for found in re.finditer(r" ?\S+", prompt[start:])]
    nats = [FOUND if word.strip() == WORD and WORD in text else NATS for _, word in words]
    told = {
        "text_offset": [0, len(head), *(start + place for place, _ in words), len(prompt)],
        "token_logprobs": [None, -9.0, *nats, -7.0],
    }
    return {"choices": [{"text": prompt, "logprobs": told}]}


def scored(folder: Path, told: Stub, *more: str) -> dict[int, Any]:
    base = [str(folder / "latents"), "--endpoint", told.url, "--model", "m", "--retries", "0", "--of", "person"]
    latents = f"{PLANTED},{OTHER}"
    language_command.main(
        [*base, "--latents", latents, "--scores", "intervention", "--steer", "100", "--test", "8", *more]
    )
    notes = Latents.open(folder / "latents").notes
    return {one.latent: notes.scores(one.id)[-1] for one in notes.explanations() if one.method == "person"}


def test_a_planted_latent_scores_above_its_controls(folder: Path) -> None:
    with stub(judge) as told:
        found = scored(folder, told)
        asked = len(told.asked)
        assert scored(folder, told) == found
        assert len(told.asked) == asked > 16
    planted, other = found[PLANTED], found[OTHER]
    texts = planted.details["texts_written"]
    assert planted.details["counts"] == {"texts": 8, "unread": 0}
    # One word of three is found or not: the score is a share of texts times that word's gain.
    gains = [(FOUND - NATS) * ((WORD in one["steered"]) - (WORD in one["clean"])) for one in texts]
    assert np.allclose([one["gain"] for one in texts], gains)
    assert planted.value == pytest.approx(np.mean(gains))
    assert 0.2 < planted.low <= planted.value <= planted.high <= FOUND - NATS + 1e-9
    controls = planted.details["controls"]
    assert controls["shuffled"] == {"value": 0, "low": 0, "high": 0, "counts": {"texts": 8, "unread": 0},
                                    "text": SAID[OTHER]}  # fmt: skip
    assert controls["empty"]["value"] == 0
    assert other.value == 0
    assert other.details["controls"]["shuffled"]["value"] < planted.low


def test_texts_are_those_of_the_splice(folder: Path) -> None:
    latents = Latents.open(folder / "latents")
    steered = Steering(latents, 100.0, 0)
    quiet = [one.example for one in choose(latents, PLANTED, Sides(None, 0), 40, 8).silent]
    pairs = steered.pairs(PLANTED, quiet)
    assert pairs == Steering(latents, 100.0, 0).pairs(PLANTED, quiet)
    assert pairs != Steering(latents, 100.0, 1).pairs(PLANTED, quiet)
    assert [asdict(one)["clean"] for one in pairs] != [one.steered for one in pairs]
    short = [one for one in quiet if len(one.tokens) < steering.BEGINNING]
    assert len(pairs) == len(quiet) - len(short)
    model, tokenizer, sae = load_causal_lm("bundled"), load_tokenizer("bundled"), SAE.from_pretrained(folder / "sae")
    ids = torch.tensor([[0, *one.tokens[: steering.BEGINNING].tolist()] for one in quiet if one not in short])
    value = 100.0 * float(latents.table["max"][PLANTED])
    for name, edits in (("clean", []), ("steered", [Edit([PLANTED], "set", value)])):
        torch.manual_seed(0)
        with SplicedModel(model, sae, HOOK, edits=edits) as spliced:
            full = spliced.generate(
                ids, max_new_tokens=steering.WRITTEN, do_sample=True, top_k=0, top_p=1.0, pad_token_id=1
            )
        texts = [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in full]
        assert [getattr(one, name) for one in pairs] == texts


def test_reasons(folder: Path) -> None:
    """Null with a reason: no log probabilities, a failing endpoint, which is asked again."""
    with stub(lambda *_: {"choices": [{"text": "x"}]}) as told:
        assert scored(folder, told, "--test", "7")[PLANTED].details["why"] == "the endpoint gives no log probabilities"
        assert "no log prob" in scored(folder, told, "--test", "7", "--no-logprobs")[PLANTED].details["why"]
    with stub(lambda *_: (500, {}, "oops")) as told:
        one = scored(folder, told, "--test", "6")[PLANTED]
        assert one.value is None
        assert one.details["unread"][0]["again"]
        told.answer = judge
        assert scored(folder, told, "--test", "6")[PLANTED].value > 0


@pytest.mark.parametrize("wrong", [("--steer", "0"), ("--steer", "nan"), ("--dictionary", "nowhere")])
def test_wrong_input_is_one_line_before_anything_is_asked(
    folder: Path, capsys: pytest.CaptureFixture[str], wrong: tuple[str, str]
) -> None:
    with stub(judge) as told:
        with pytest.raises(SystemExit):
            scored(folder, told, *wrong)
        assert not told.asked
    error = capsys.readouterr().err
    assert wrong[0] in error
    assert error.count("\n") == 1


def test_a_strength_that_the_model_can_not_bear(folder: Path) -> None:
    with stub(judge) as told:
        one = scored(folder, told, "--steer", "3e38")[PLANTED]
    assert one.value is None
    assert "lower --steer" in one.details["why"]


def test_a_dictionary_that_no_model_has_places_for(folder: Path) -> None:
    latents = opened_study(folder, dictionary={"reads": ["vision:x"], "writes": ["vision:x"]})
    with pytest.raises(NoSteeringError, match="no places of one model"):
        Steering(latents, 1.0, 0).pairs(PLANTED, [])
