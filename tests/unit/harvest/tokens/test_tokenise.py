"""Documents to the tokenizer's own ids; special tokens; chats; and what is said of documents that can't be taken."""

import shutil
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from shared.basics.errors import GranaryError
from shared.bundled import MODEL_DIR
from shared.lm import load_tokenizer, special_ids
from stage_harvest.corpus import Chat, Document
from stage_harvest.corpus.base import Content
from stage_harvest.tokens.encoder import TextEncoder
from stage_harvest.tokens.template import ChatRenderer
from stage_harvest.tokens.tokenise import Tokeniser

HELLO = Chat([{"role": "user", "content": "hello"}])
TODAY = date(2026, 11, 26)


def tokeniser(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> Tokeniser:
    encoder = TextEncoder(tokenizer.backend_tokenizer.to_str())
    return Tokeniser(vocab_size or len(tokenizer), tokenizer, ChatRenderer(tokenizer, TODAY), encoder)


def ids_of(contents: Iterable[Content], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    documents = [Document(content, f"row {number}") for number, content in enumerate(contents, 1)]
    return [ids.tolist() for ids in tokeniser(tokenizer).ids(documents)]


def test_ids_are_the_tokenizers() -> None:
    tokenizer = load_tokenizer("bundled")
    texts = ["def f(x):\n    return x\n", "", "a <s> spelt out", "ünïcode ☃", "x" * 5000]
    wanted = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert ids_of(texts, tokenizer) == wanted
    tokenizer.split_special_tokens = not tokenizer.split_special_tokens
    other = tokenizer(texts[2], add_special_tokens=False).input_ids
    assert other != wanted[2]
    assert ids_of([texts[2]], tokenizer) == [other]


def test_kinds_of_documents_keep_their_order() -> None:
    tokenizer = load_tokenizer("bundled")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    first, second, third, fourth = ids_of(["one", HELLO, np.array([7, 8]), "two"], tokenizer)
    assert tokenizer.decode(first) == "one"
    assert second[0] == tokenizer.bos_token_id
    assert second[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(second[1:-1]) == "user: hello"
    assert third == [7, 8]
    assert tokenizer.decode(fourth) == "two"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([5, 4096]), "row 2: token id 4096 is outside the model's vocabulary of 4096"),
        (np.array([5, -1]), "row 2: token id -1 is outside"),
        (np.array([2**32 - 1], np.uint32), "row 2: token id 4294967295 is outside"),
        ("half a pair: \ud800", "row 2 holds half of a surrogate pair, which is no text, at character 13"),
        (HELLO, "the model's tokenizer has no chat template"),
    ],
)
def test_a_document_that_cannot_be_taken_is_named(content: Content, message: str) -> None:
    tokenizer = load_tokenizer("bundled")
    with pytest.raises(GranaryError, match=message):
        ids_of(["fine", content], tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content.no_such_method() }}", r"row 1: the chat template fails on it \(UndefinedError: "),
        ("{{ raise_exception('roles must alternate') }}", r"row 1: .* \(TemplateError: roles must alternate\)"),
        ("{{ 1 / 0 }}", r"row 1: .* \(ZeroDivisionError: "),
        ("{% for m in messages %}", r"row 1: .* \(TemplateSyntaxError: "),
        ("{{ messages[0].content + 3 }}", r"row 1: .* \(TypeError: "),
    ],
)
def test_a_template_that_fails_is_one_line_that_names_the_row(template: str, message: str) -> None:
    tokenizer = load_tokenizer("bundled")
    tokenizer.chat_template = template
    with pytest.raises(GranaryError, match=message):
        ids_of([HELLO], tokenizer)


def test_a_model_without_a_tokenizer_takes_ids_alone() -> None:
    without = Tokeniser(10, None, None, TextEncoder(""), "model x has no tokenizer")
    assert [ids.tolist() for ids in without.ids([Document(np.array([1, 9]), "row 1")])] == [[1, 9]]
    for content in ("text", HELLO):
        with pytest.raises(GranaryError, match="row 2 holds text, and model x has no tokenizer"):
            list(without.ids([Document(np.array([1]), "row 1"), Document(content, "row 2")]))


def test_the_template_the_variables_and_the_date_are_its_identity() -> None:
    tokenizer = load_tokenizer("bundled")
    tokenizer.chat_template = "{{ messages[0].content }}{% if loud %}!{% endif %}"
    plain, loud = ChatRenderer(tokenizer, TODAY), ChatRenderer(tokenizer, TODAY, {"loud": True})
    assert (plain.render(HELLO, "row 1"), loud.render(HELLO, "row 1")) == ("hello", "hello!")
    assert plain.identity() == ChatRenderer(tokenizer, date(2027, 1, 1)).identity()
    assert plain.identity() != loud.identity()
    assert "date" not in plain.identity()
    before = plain.identity()
    tokenizer.chat_template = (
        "{{ messages[0].content }}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    )
    assert plain.render(HELLO, "row 1") == "hello26 Nov 2026"
    tokenizer.chat_template = "{{ strftime_now('%A, %-d %B %Y, %H:%M, 5 %%d') }}{{ bos_token }} {{ strftime_now('') }}|"
    wanted = "Thursday, 26 November 2026, 00:00, 5 %d" + tokenizer.bos_token + " |"
    assert plain.render(HELLO, "row 1") == plain.render_spans(HELLO, "row 1")[0] == wanted
    assert plain.identity() != before
    assert plain.identity()["date"] == "2026-11-26"
    assert plain.identity() != ChatRenderer(tokenizer, date(2027, 1, 1)).identity()


def test_only_chats_that_became_tokens_count() -> None:
    """Not those that were read ahead: how far that is depends on the number of workers."""
    tokenizer = load_tokenizer("bundled")
    tokenizer.chat_template = "{{ messages[0].content }}"
    made = tokeniser(tokenizer)
    assert made.chats is not None
    stream = made.ids([Document("text", "row 1"), Document(HELLO, "row 2")])
    next(stream)
    assert not made.chats.used
    next(stream)
    assert made.chats.used


@pytest.mark.parametrize(
    "marks", [["<|im_start|>", "<|im_end|>"], ["<|fim_prefix|>"], ["<|reserved_special_token_0|>"]]
)
def test_added_tokens_marked_special_are_special(tmp_path: Path, marks: list[str]) -> None:
    shutil.copytree(MODEL_DIR, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "m/model.safetensors").touch()
    file = tmp_path / "m/tokenizer.json"
    grown = Tokenizer.from_file(str(file))
    grown.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    grown.add_tokens([AddedToken("<ordinary>", special=False)])
    grown.save(str(file))
    tokenizer = load_tokenizer(str(tmp_path / "m"))
    special = special_ids(tokenizer)
    assert {grown.token_to_id(mark) for mark in marks} <= set(special.all)
    assert grown.token_to_id("<ordinary>") not in special.all
    assert special.all == tuple(sorted(special.all))


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    shutil.copy(MODEL_DIR / "config.json", tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(GranaryError, match=r"has no tokenizer: .* holds none of tokenizer\.json, .*save_pretrained"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(GranaryError, match=r"has no tokenizer that loads: \S+"):
        load_tokenizer(str(tmp_path))
