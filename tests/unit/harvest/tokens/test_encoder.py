"""Tokenising in worker processes: the ids of one process, kept batches, and workers that die."""

import os
import signal
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import pytest

from shared.basics.errors import GranaryError
from shared.lm import load_tokenizer
from stage_harvest.corpus import Chat, Document
from stage_harvest.tokens.encoder import TextEncoder, Texts, from_array, to_array
from stage_harvest.tokens.template import ChatRenderer
from stage_harvest.tokens.tokenise import Tokeniser

TEXTS = ["def f(x):\n    return x\n", "", "a <s> spelt out", "ünïcode ☃", "x " * 3000]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage_harvest.tokens.tokenise.BATCH_DOCUMENTS", 3)
    monkeypatch.setattr("stage_harvest.tokens.encoder.OWN_CHARACTERS", 5000)


@pytest.mark.usefixtures("small_batches")
def test_workers_give_the_ids_of_one_process(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bundled")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    serialised = tokenizer.backend_tokenizer.to_str()
    contents = [*TEXTS, Chat([{"role": "user", "content": "hello"}]), np.array([7, 8])]
    contents += [f"{i} {text}" for i in range(6) for text in TEXTS]
    documents = [Document(content, "row") for content in contents]

    def ids(encoder: TextEncoder) -> list[list[int]]:
        chats = ChatRenderer(tokenizer, date(2026, 11, 26))
        return [row.tolist() for row in Tokeniser(len(tokenizer), tokenizer, chats, encoder).ids(documents)]

    wanted = ids(TextEncoder(serialised))
    for reused in (0, 14):  # 13 batches of texts, one of chats
        with TextEncoder(serialised, workers=2, folder=tmp_path) as encoder:
            assert ids(encoder) == wanted
        assert encoder.reused == reused


def encoded(encoder: TextEncoder, batches: Iterable[Texts]) -> list[list[list[int]]]:
    """Ids by batch and string."""
    return [[ids.tolist() for ids in sets[0]] for _, sets in encoder.encode((None, [texts]) for texts in batches)]


def test_kept_batches_are_told_apart_and_torn_ones_made_again(tmp_path: Path) -> None:
    serialised = load_tokenizer("bundled").backend_tokenizer.to_str()
    batches = [Texts(TEXTS, True), Texts(TEXTS, False), Texts(TEXTS[:-1], True), Texts(["a", "b"], True)]
    batches.append(Texts(["ab", ""], True))  # the same characters
    encoder = TextEncoder(serialised, folder=tmp_path)
    wanted = encoded(encoder, batches)
    assert len(list(tmp_path.iterdir())) == len(batches)
    for torn in tmp_path.iterdir():
        torn.write_bytes(torn.read_bytes()[:-1] if torn.stat().st_size % 3 else b"")
    again = TextEncoder(serialised, folder=tmp_path)
    assert encoded(again, batches) == wanted
    assert again.reused == 0


def test_packed_ids_split_again() -> None:
    tokenizer = load_tokenizer("bundled").backend_tokenizer
    for strings in ([], [""], ["", "one", ""], TEXTS):
        texts = Texts(strings, True)
        wanted = [tokenizer.encode(string, add_special_tokens=False).ids for string in strings]
        assert [ids.tolist() for ids in from_array(to_array(tokenizer, texts))] == wanted


def test_a_worker_that_is_killed_is_one_line() -> None:
    """At work; test_workers.py kills them at other moments."""
    serialised = load_tokenizer("bundled").backend_tokenizer.to_str()

    def batches() -> Iterator[Texts]:
        for number in range(100):
            if number == 10:
                for child in psutil.Process().children():
                    if "spawn_main" in " ".join(child.cmdline()):
                        os.kill(child.pid, signal.SIGKILL)
            yield Texts(["x " * 10_000] * 10, True)

    with TextEncoder(serialised, workers=1) as encoder, pytest.raises(GranaryError, match="process was killed"):
        encoded(encoder, batches())


def test_a_disk_that_refuses_is_one_line() -> None:
    serialised = load_tokenizer("bundled").backend_tokenizer.to_str()
    encoder = TextEncoder(serialised, folder=Path("/proc/nowhere"))
    with pytest.raises(GranaryError, match=r"keeping token ids in /proc/nowhere: No such file.*set spool_dir"):
        encoded(encoder, [Texts(["x"], True)])
