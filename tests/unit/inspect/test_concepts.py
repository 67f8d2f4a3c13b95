"""Labels on tokens, and planted latents that come first."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.basics.errors import GranaryError
from shared.latents.folder import Latents
from shared.latents.vocabulary import Vocabulary
from shared.sae.config import SAEConfig
from shared.sae.sites import Sites
from shared.sae.variants import SAE
from shared.store import Store
from stage_inspect.concepts import python
from stage_inspect.concepts.documents import document, documents
from stage_inspect.concepts.labels import Concepts, parse, touched
from stage_inspect.concepts.score import Tally, rank
from stage_inspect.find import main
from stage_inspect.inspect import inspect
from tests.inspection import HOOK, inspect_config
from tests.synthetic import synthetic_plan

SOURCE = '''\
"""Module text."""
import os.path as p
from a.b import c

@wraps(x)
class Dog(Animal):
    """A dog."""

    def bark(self, times: int = 3, *, loud=True) -> None:
        # noise
        if times > 0x1F: raise ValueError("no" + f"{self.name!r}")
        return self.bark(times=[1.5, None])
'''


def texts(name: str, source: str = SOURCE) -> list[str]:
    return [source[start:stop] for start, stop in python.spans(source)[name]]


def test_concepts_of_python() -> None:
    assert texts("docstring") == ['"""Module text."""', '"""A dog."""']
    assert texts("string")[:3] == ['"""Module text."""', '"""A dog."""', '"no"']
    assert texts("comment") == ["# noise"]
    assert texts("number") == ["3", "0x1F", "1.5"]
    assert texts("self") == ["self"] * (3 if len(texts("string")) > 4 else 2)
    assert texts("constant") == ["True", "None", "None"]
    assert texts("after def") == ["bark"]
    assert texts("after class") == ["Dog"]
    assert texts("parameter") == ["self", "times", "loud"]
    assert texts("decorator") == ["@", "wraps", "(", "x", ")"]
    assert texts("import") == ["os", "path", "a", "b", "c"]
    assert texts("call") == ["wraps", "ValueError", "bark"]
    assert texts("exception") == ["ValueError"]
    assert "bark" in texts("attribute")
    assert texts("indentation") == ["    ", "    ", "        ", "        "]
    assert texts("keyword")[:4] == ["import", "as", "from", "import"]


def test_what_is_no_python_ends_it_quietly() -> None:
    assert python.spans("def f(:\n  'unclosed\n")["after def"]
    assert python.spans("")["string"] == []
    assert python.spans("\x00 $$ ???\n'''open")["docstring"] == []


def test_tokens_share_characters_with_spans() -> None:
    vocabulary = Vocabulary.of([b"<s>", b"caf\xc3", b"\xa9 x", b" y", b"\xff"], special=[0])
    whole = document(np.array([0, 1, 2, 3]), np.arange(4), vocabulary)
    assert whole.text == "café x y"
    marks = touched(whole, [(whole.text.index("é"), whole.text.index("é") + 1), (7, 8)])
    assert marks.tolist() == [False, True, True, True] or marks.tolist() == [False, False, True, True]
    broken = document(np.array([4, 3]), np.arange(2), vocabulary)
    assert touched(broken, [(1, 3)]).tolist() == [False, True]


def test_f1_and_auroc_are_those_of_the_tokens() -> None:
    """Against every threshold tried by hand, and every pair of tokens compared."""
    rng = np.random.default_rng(0)
    N, F = 400, 3
    value = rng.integers(0, 9, (N, F))  # the bin, 0: silent
    truth = (value[:, 1] > 4) ^ (rng.random(N) < 0.1)
    group = rng.integers(0, 5, N)
    tally = Tally.empty(1, 5, F)
    for latent in range(F):
        fired = value[:, latent] > 0
        tally.add(np.full(fired.sum(), latent), value[fired, latent], group[fired], truth[None, fired])
    tally.yes_CG[0] += np.bincount(group[truth], minlength=5)
    tally.all_G += np.bincount(group, minlength=5)
    found = {one.latent: one for one in rank(tally, 0, 3)}
    assert rank(tally, 0, 3)[0].latent == 1
    for latent, one in found.items():
        said = [value[:, latent] >= edge for edge in range(1, 9)]
        best = max(2 * (yes & truth).sum() / (yes.sum() + truth.sum()) for yes in said)
        assert one.f1 == pytest.approx(best)
        above = value[truth, latent][:, None] - value[~truth, latent]
        assert one.auroc == pytest.approx(((above > 0) + (above == 0) / 2).mean())
        assert one.low < one.f1 < one.high
    yes = value[:, 1] >= found[1].threshold_bin
    assert found[1].precision == pytest.approx((yes & truth).sum() / yes.sum())
    assert found[1].recall == pytest.approx((yes & truth).sum() / truth.sum())


def planted(folder: Path) -> Store:
    """A store of Python text by bytes whose activations say which bytes are digits, and which are of ``self``."""
    data = (SOURCE * 6).encode()
    T, D = 96, 8
    contexts = len(data) // T
    tokens = np.frombuffer(data, np.uint8)[: contexts * T].reshape(contexts, T).astype(np.int32) + 1
    packing = {"mode": "isolated", "long_documents": "split", "bos": "none"}
    plan = synthetic_plan(
        contexts, T, D, hooks={HOOK: D}, dtype="float32", heldout_fraction=0.3,
        provenance={"model": {"id": "planted"}, "packing": packing},
    )  # fmt: skip
    text = data.decode()
    spans = python.spans(text)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(contexts * T, D)).astype(np.float32)) * 0.01
    for feature, name in ((0, "number"), (1, "self"), (2, "comment")):
        for start, stop in spans[name]:
            x[start : min(stop, len(x)), feature] += 1
    zeros = np.zeros_like(tokens)
    store = Store.create(folder, plan, tokens, np.ones_like(tokens, bool), zeros)
    for shard in store.pending():
        span = store.shard_contexts(shard)
        store.write_shard(shard, {HOOK: x.view(contexts, T, D)[span.start : span.stop].contiguous()})
    store.finalize()
    return store


def test_planted_latents_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = planted(tmp_path / "store")
    config = SAEConfig(d_model=8, d_latent=8, k=2, normalisation="none", pre_bias=False, sites=Sites.of(HOOK))
    sae = SAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(8).roll(3, 0))  # latent 3 is feature 0, 4 is 1, 5 is 2
        sae.W_dec.copy_(sae.W_enc)
    sae.save_pretrained(tmp_path / "sae")
    vocabulary = [b"<s>", *(bytes([byte]) for byte in range(256))]
    monkeypatch.setattr("stage_inspect.finish.finish.recorded_vocabulary", lambda *_: (vocabulary, (0,)))
    inspect(inspect_config(tmp_path))
    found = tmp_path / "found.json"
    common = [str(tmp_path), "--split", "all", "--json", str(found)]
    main([*common, "--python", "number", "self", "comment", "--regex", "self", "# ?noise", "--token", "#"])
    best = {name: matches[0] for name, matches in json.loads(found.read_text()).items()}
    assert {name: one["latent"] for name, one in best.items()} == {
        "number": 3, "self": 4, "comment": 5, "/self/": 4, "/# ?noise/": 5, "token #": 5,
    }  # fmt: skip
    for name in ("number", "self", "comment"):
        assert best[name]["f1"] > 0.97, (name, best[name])
        assert best[name]["auroc"] > 0.97, (name, best[name])
    assert len(Latents.open(tmp_path / "latents").notes.concepts()) == len(best)
    assert "number" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*common, "--regex", "nowhere to be seen"])
    assert "no token of these contexts is an example of /nowhere" in capsys.readouterr().err
    whole = list(documents(store, store.contexts("heldout"), Latents.open(tmp_path / "latents").vocabulary))
    assert [len(one.text) for one in whole] == [store.num_contexts * 96]


def test_wrong_concepts_are_told() -> None:
    vocabulary = Vocabulary.of([b"a"])
    for arguments, told in (
        ((["nonsense"], [], []), "is no concept of Python"),
        (([], ["("], []), "is no regular expression"),
        (([], [], ["zz"]), "is no token"),
        (([], [], []), "say what to look for"),
    ):
        with pytest.raises(GranaryError, match=told):
            parse(*arguments, vocabulary)
    assert Concepts().names == []
