"""Every JSON or YAML file that a stranger may hand over: with any value of another kind it works or is one line."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from granary.transcoders import check_same_set
from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_columns, read_metrics
from shared.latents.folder import Latents
from shared.lm import load_config, load_tokenizer, load_trunk, model_identity
from shared.lm.hookpoint import hook_points
from shared.lm.token_bytes import token_bytes
from shared.sae.folder import describe
from shared.sae.loading import KINDS, load, load_any
from shared.sae.rows_file import RowsFile
from shared.store import Store
from shared.store.format import layout
from shared.store.format.manifest import seal, unseal
from shared.store.verify import verify
from stage_eval.grid import is_of_grid, last_grid
from stage_inspect.concepts.marked import MarkedSpans
from stage_inspect.explanations import read as read_explanations
from stage_trace.files import with_marks
from tests.foreign import (
    write_dictionary_learning,
    write_gemma_scope,
    write_llama_scope,
    write_opensae,
    write_saelens,
)
from tests.foreign_vision import write_prisma, write_sae_made_easy
from tests.formulas import PROVENANCE, make_sae
from tests.fuzzing import survive
from tests.latents import synthetic_latents
from tests.synthetic import synthetic_plan, synthetic_store

FEW, ALL = 10, 1000
EACH = pytest.mark.parametrize("most", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])

FOREIGN: dict[str, tuple[Callable[[Path], None], str]] = {
    "saelens": (partial(write_saelens, architecture="topk"), "cfg.json"),
    "saelens_batchtopk": (partial(write_saelens, architecture="batchtopk"), "cfg.json"),
    "opensae": (partial(write_opensae, normalise=True, shift_back=False, shards=False), "config.json"),
    "opensae_index": (
        partial(write_opensae, normalise=True, shift_back=False, shards=True),
        "model.safetensors.index.json",
    ),
    "dictionary_learning": (partial(write_dictionary_learning, dict_class="BatchTopKSAE"), "config.json"),
    "llama_scope": (write_llama_scope, "hyperparams.json"),
    "gemma_scope": (partial(write_gemma_scope, version=2), "config.json"),
    "sae_made_easy": (write_sae_made_easy, "adapter_config.json"),
    "prisma": (write_prisma, "config.json"),
}


def write_and(path: Path, use: Callable[[], object], document: Any) -> None:
    path.write_text(json.dumps(document))
    use()


@EACH
@pytest.mark.parametrize("name", FOREIGN)
def test_folders_of_other_projects(tmp_path: Path, name: str, most: int) -> None:
    write, file = FOREIGN[name]
    folder = tmp_path / "theirs"
    write(folder)
    path = folder / file
    survive(json.loads(path.read_text()), partial(write_and, path, partial(load_any, folder)), most)


@EACH
def test_a_dictionary(tmp_path: Path, most: int) -> None:
    make_sae("batchtopk", "centre_scale", pre_bias=True).save_pretrained(tmp_path, PROVENANCE, {"lr": 1e-3})
    path, weights = tmp_path / "config.json", tmp_path / "sae.safetensors"
    with safe_open(weights, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def use(document: Any) -> None:
        text = json.dumps(document, indent=2)
        path.write_text(f"{text}\n")
        save_file(tensors, weights, {"granary": text})  # as if it had been saved so
        describe(tmp_path).config(KINDS)
        load(tmp_path, verify=True)

    survive(json.loads(path.read_text()), use, most)


@EACH
@pytest.mark.parametrize("file", ["meta.json", "histogram/zarr.json"])
def test_a_latents_folder(tmp_path: Path, file: str, most: int) -> None:
    synthetic_latents(tmp_path)
    path = tmp_path / file

    def use() -> None:
        latents = Latents.open(tmp_path)
        latents.top(1, 3)
        latents.latent(1)
        latents.vocabulary  # noqa: B018

    survive(json.loads(path.read_text()), partial(write_and, path, use), most)


@EACH
@pytest.mark.parametrize(
    "key", [layout.extent_key(0), layout.extent_tokens_key(0), layout.manifest_key(1), layout.COMPLETE]
)
def test_a_store(tmp_path: Path, key: str, most: int) -> None:
    plan = synthetic_plan(d_model=8, seq_len=16)
    synthetic_store(tmp_path, plan)
    path = tmp_path / key

    def use(document: Any) -> None:
        try:
            path.write_bytes(seal(document))
        except (TypeError, ValueError):
            return  # NaN and the like have no seal
        store = Store.open(tmp_path)
        for context in store.contexts("train")[:2]:
            store.read_context("layers.2.resid_post", int(context))
        store.tokens(range(2))
        store.statistics("layers.2.resid_post")
        store.complete  # noqa: B018
        verify(str(tmp_path))

    survive(unseal(path.read_bytes(), key), use, most // 2 if most == FEW else most)


@EACH
def test_a_model(tmp_path: Path, most: int) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"

    def use() -> None:
        model_identity(str(tmp_path))
        read = load_config(str(tmp_path))
        hooks = hook_points("1", ["resid_post"], read.num_hidden_layers)
        assert hooks
        load_trunk(str(tmp_path), "float32", num_layers=2, last_mlp=True, device=torch.device("cpu"))

    survive(json.loads(path.read_text()), partial(write_and, path, use), most // 2 if most == FEW else most)


@EACH
def test_a_tokenizer(tmp_path: Path, most: int) -> None:
    from shared.bundled import MODEL_DIR

    for file in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        if (MODEL_DIR / file).is_file():
            shutil.copy(MODEL_DIR / file, tmp_path / file)
    path = tmp_path / "tokenizer_config.json"

    def use() -> None:
        token_bytes(load_tokenizer(str(tmp_path)))

    survive(json.loads(path.read_text()), partial(write_and, path, use), most)


@EACH
def test_explanations(tmp_path: Path, most: int) -> None:
    path = tmp_path / "explanations.json"
    one = {"index": "3", "description": "dates", "typeName": "a", "explanationModelName": "b", "id": "x", "layer": "2"}
    survive([one, one], partial(write_and, path, lambda: list(read_explanations(path, 10))), most)


@EACH
def test_a_sweeps_records(tmp_path: Path, most: int) -> None:
    def write(path: Path, use: Callable[[], object], document: Any) -> None:
        path.write_text(yaml.safe_dump(document))
        use()

    record = {"hydra": {"overrides": {"task": ["sae.k=8,16", "name=x"]}}}
    path = tmp_path / "multirun.yaml"
    survive(record, partial(write, path, lambda: last_grid(tmp_path)), most)
    survive(record, partial(write, path, lambda: check_same_set(tmp_path, ["sae.k=8,16", "name=x"])), most)
    (tmp_path / ".hydra").mkdir()
    run = tmp_path / ".hydra/overrides.yaml"
    survive(["sae.k=8"], partial(write, run, lambda: is_of_grid(tmp_path, {frozenset(["sae.k=8"])})), most)


@EACH
def test_metrics(tmp_path: Path, most: int) -> None:
    def use() -> None:
        read_metrics(tmp_path)
        read_columns(tmp_path, ["step", "fvu"])

    path = tmp_path / "metrics.jsonl"
    assert survive({"step": 1, "fvu": 0.5}, partial(write_and, path, use), most) > 0


DEPTH = "[" * 100_000


@pytest.mark.parametrize("file", ["explanations.jsonl", "spans.jsonl", "config.json", "rows.safetensors"])
def test_nesting_without_end_is_one_line(tmp_path: Path, file: str) -> None:
    read: dict[str, Callable[[Path], object]] = {
        "explanations.jsonl": lambda path: list(read_explanations(path, 10)),
        "spans.jsonl": MarkedSpans.read,
        "config.json": lambda path: describe(path.parent),
        "rows.safetensors": RowsFile,
    }
    path = tmp_path / file
    deep = DEPTH.encode()
    path.write_bytes(len(deep).to_bytes(8, "little") + deep if file.endswith("tensors") else deep)
    with pytest.raises(GranaryError) as caught:
        read[file](path)
    assert "\n" not in str(caught.value)


def test_metrics_and_marks_nested_without_end_count_as_damaged(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{DEPTH}\n{{"step": 1}}\n')
    assert read_metrics(tmp_path) == [{"step": 1}]
    (tmp_path / "graph.json").write_text(DEPTH)
    graph = object()
    assert with_marks(graph, tmp_path / "graph.json") is graph  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize("details", ["{", "[1]", DEPTH, b"\xff", 3])
def test_details_in_notes_of_another_form_are_one_line(tmp_path: Path, details: object) -> None:
    synthetic_latents(tmp_path)
    notes = Latents.open(tmp_path).notes
    notes.add_explanation(1, "dates", method="rule", author="me")
    notes.add_concept("a", "b", {})
    with closing(sqlite3.connect(notes.path)) as db, db:
        db.execute("UPDATE explanation SET details = ?", (details,))
        db.execute("UPDATE concept SET result = ?", (details,))
    for read in (notes.explanations, notes.concepts):
        with pytest.raises(GranaryError, match="a row of"):
            read()
