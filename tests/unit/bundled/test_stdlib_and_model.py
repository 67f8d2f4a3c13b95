"""The bundled model loads offline, fits in 5 MB and predicts Python it never saw; its corpus is stable."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from examples.bundled.make_model import Recipe
from examples.bundled.measure import next_token_loss, pack, token_stream, unigram_entropy
from examples.bundled.record import model_card
from shared.basics.errors import GranaryError
from shared.bundled import MODEL_DIR, stdlib


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def library() -> dict[str, list[tuple[str, str]]]:
    """Names and texts of each split."""
    return {"train": list(stdlib.documents("train")), "heldout": list(stdlib.documents("heldout"))}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((MODEL_DIR / "training.json").read_text())


def test_folder_is_at_most_5_mb() -> None:
    assert sum(f.stat().st_size for f in MODEL_DIR.rglob("*") if f.is_file()) <= 5_000_000


@pytest.mark.slow
def test_loads_with_the_network_off() -> None:
    script = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('network used')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "AutoTokenizer.from_pretrained(sys.argv[1]); AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, MODEL_DIR], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_is_a_small_llama_stored_in_bfloat16(model: LlamaForCausalLM, record: dict[str, Any]) -> None:
    assert type(model) is LlamaForCausalLM
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert json.loads((MODEL_DIR / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(MODEL_DIR).dtype == torch.bfloat16
    assert model.config.max_position_embeddings >= 4096
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]


@pytest.mark.parametrize(
    "text",
    [
        Path(__file__).read_text(encoding="utf-8"),
        "def caf\u00e9(\u4e2d\u6587: str) -> None:\n\t\u201cna\u00efve\u201d  # \U0001f40d\r\n\n    \x00",
        "<s>struck out</s>",
        "  leading and trailing  ",
        "",
    ],
    ids=["source", "non_ascii", "special_token_text", "spaces", "empty"],
)
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.eos_token_id not in ids
    assert ids[1:] == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_ids_are_the_models(tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (model.config.bos_token_id, model.config.eos_token_id)


def test_predicts_files_it_never_saw(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    library: dict[str, list[tuple[str, str]]],
) -> None:
    files = [(name, text) for name, text in library["heldout"] if 4_000 < len(text) < 40_000]
    contexts = pack(token_stream(tokenizer, ((name, text[:8_000]) for name, text in files)), 1024)[:8]
    loss = next_token_loss(model, contexts).mean().item()
    assert loss < 0.7 * unigram_entropy(contexts)
    # Other files and shorter contexts than the record's, hence near it and not equal to it.
    assert loss == pytest.approx(record["heldout_loss"], rel=0.25)


@pytest.mark.slow
def test_predicts_at_the_last_position_of_a_full_context(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    contexts = pack(token_stream(tokenizer, stdlib.documents("heldout")), 4096)[::12]  # few, of many files
    per_position = next_token_loss(model, contexts).mean(dim=0)
    assert per_position.shape == (4095,)
    assert per_position[3072:].mean() < 0.75 * unigram_entropy(contexts)


def test_loss_measure_matches_the_models_own(model: LlamaForCausalLM) -> None:
    contexts = np.random.default_rng(0).integers(2, 4096, size=(3, 63)).astype(np.int32)
    ids = torch.from_numpy(contexts.astype(np.int64))
    with torch.inference_mode():
        expected = model(ids, labels=ids).loss.item()
    assert next_token_loss(model, contexts, batch_size=2).mean().item() == pytest.approx(expected, rel=1e-5)


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.array([[5, 5, 9, 9]], dtype=np.int32)) == pytest.approx(math.log(2))
    assert unigram_entropy(np.full(8, 3, dtype=np.int32)) == 0.0


def test_record_is_consistent(record: dict[str, Any]) -> None:
    recipe = record["recipe"]
    assert record["tokens_seen"] == recipe["steps"] * recipe["tokens_per_step"]
    assert record["loss_curve"][-1]["step"] == recipe["steps"]
    assert record["loss_curve"][-1]["train_loss"] < 0.6 * record["loss_curve"][0]["train_loss"]
    assert record["heldout_loss"] < 0.6 * record["heldout_unigram_entropy"]
    by_position = record["heldout_loss_by_position"]
    # Positions that training hardly saw cost loss: the same tokens must be no harder to predict far into a context.
    assert by_position["2048-4096"] <= by_position["512-1024"]
    card = (MODEL_DIR / "README.md").read_text()
    assert record["command"] in card
    assert f"--steps {recipe['steps']}" in record["command"]
    assert f"{record['heldout_loss']:.3f}" in card


def test_record_is_of_the_script_as_it_stands(record: dict[str, Any]) -> None:
    recipe = Recipe(steps=record["recipe"]["steps"], seed=record["recipe"]["seed"])
    assert record["recipe"] == json.loads(json.dumps(asdict(recipe)))
    assert (MODEL_DIR / "README.md").read_text() == model_card(record)


def test_record_names_this_corpus(record: dict[str, Any], library: dict[str, list[tuple[str, str]]]) -> None:
    if record["corpus"] != stdlib.description("train"):
        pytest.skip(f"the model was trained on the {record['corpus']}")
    for split, documents in library.items():
        assert stdlib.content_hash(documents) == record["corpus_hash"][split]


def test_splits_are_disjoint_and_complete(library: dict[str, list[tuple[str, str]]]) -> None:
    documents = {**library, "all": stdlib.documents("all")}
    ids = {split: [name for name, _ in texts] for split, texts in documents.items()}
    assert not set(ids["train"]) & set(ids["heldout"])
    assert set(ids["train"]) | set(ids["heldout"]) == set(ids["all"])
    assert len(set(ids["all"])) == len(ids["all"])
    assert 0.01 < len(ids["heldout"]) / len(ids["all"]) < 0.04
    assert not any("site-packages" in name or "__pycache__" in name for name in ids["all"])
    assert "pydoc_data/topics.py#assert" in ids["all"]


def test_split_of_a_path_never_changes() -> None:
    # A changed hash would let the bundled model's held-out files into training.
    assert all(stdlib.is_heldout(path) for path in ("socket.py", "statistics.py", "turtle.py", "trace.py"))
    assert not any(stdlib.is_heldout(path) for path in ("os.py", "json/decoder.py", "pydoc_data/topics.py#if"))


def test_corpus_of_a_made_up_library(tmp_path: Path) -> None:
    for name, data in {
        "b.py": b"x = 1\r\n",
        "a/c.txt": "caf\u00e9".encode(),
        "a/latin.py": b"# caf\xe9",
        "a/empty.py": b"\n",
        "a/tests/t.py": b"t",
        "site-packages/p.py": b"p",
        "a/__pycache__/q.py": b"q",
        "notes.md": b"n",
        "pydoc_data/topics.py": b"# made\ntopics = {'while': 'W', 'if': 'I'}\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    topics = [("pydoc_data/topics.py#if", "I"), ("pydoc_data/topics.py#while", "W")]
    found = list(stdlib.documents("all", root=tmp_path))
    assert found == [("a/c.txt", "caf\u00e9"), ("a/tests/t.py", "t"), ("b.py", "x = 1\n"), *topics]
    without_tests = list(stdlib.documents("all", include_tests=False, root=tmp_path))
    assert without_tests == [found[0], found[2], *topics]
    assert stdlib.content_hash(found) == stdlib.content_hash(iter(found))
    assert stdlib.content_hash(found) != stdlib.content_hash(without_tests)
    assert stdlib.content_hash([("ab", "c")]) != stdlib.content_hash([("a", "bc")])


def test_corpus_errors_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(GranaryError, match="train, heldout, all"):
        list(stdlib.documents("test"))  # type: ignore[arg-type]
    with pytest.raises(GranaryError, match="another corpus"):
        list(stdlib.documents("all", root=tmp_path))
