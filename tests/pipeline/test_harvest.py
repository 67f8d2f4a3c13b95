"""The harvest through its command line, on a small random LLaMA with the bundled tokenizer."""

import gzip
import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from shared.lm import capture, load_causal_lm, load_tokenizer, packed_inputs
from shared.lm.hookpoint import SITES, hook_points
from shared.store import Store
from tests.cli import ForkServer
from tests.harvesting import LAYERS, VOCAB, D, Harvester, make_model, same_files


@pytest.fixture(scope="module")
def harvester(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Harvester:
    root = tmp_path_factory.mktemp("harvest")
    return Harvester(root, stages.at(root))


@pytest.fixture(scope="module")
def store(harvester: Harvester) -> Store:
    return harvester.harvest(hooks__layers="all", hooks__sites="[" + ",".join(SITES) + "]")


# What is stored


def test_tokens_are_the_tokenizers(harvester: Harvester, store: Store) -> None:
    tokenizer = load_tokenizer(str(harvester.model))
    contexts = range(store.num_contexts)
    tokens, mask = store.tokens(contexts), store.mask(contexts)
    wanted = [token for text in harvester.documents for token in tokenizer(text, add_special_tokens=False).input_ids]
    assert tokens[mask].tolist() == wanted
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    assert (tokens[store.segments(contexts) == -1] == tokenizer.eos_token_id).all()


def test_activations_equal_a_hooked_forward_bit_for_bit(harvester: Harvester, store: Store) -> None:
    model = load_causal_lm(str(harvester.model))
    hooks = hook_points("all", SITES, LAYERS)
    assert sorted(store.hooks) == sorted(str(hook) for hook in hooks)
    for shard in range(store.num_shards):
        contexts = store.shard_contexts(shard)
        for first in range(contexts.start, contexts.stop, 2):
            batch = range(first, min(first + 2, contexts.stop))
            tokens, segments = (torch.from_numpy(rows(batch)).long() for rows in (store.tokens, store.segments))
            with torch.no_grad(), capture(model, hooks) as got:
                model(**packed_inputs(model, tokens, segments, isolated=True))
            for hook in hooks:
                for row, context in enumerate(batch):
                    assert torch.equal(store.read_context(str(hook), context), got[hook][row]), f"{hook} {context}"


def test_isolated_documents_have_the_activations_they_have_alone(harvester: Harvester, store: Store) -> None:
    model = AutoModelForCausalLM.from_pretrained(harvester.model).eval()  # nothing of ours in this forward
    compared = 0
    for context in range(store.num_contexts):
        tokens, segments = store.tokens([context])[0], store.segments([context])[0]
        stored = store.read_context("layers.1.resid_post", context)
        for segment in range(segments.max() + 1):
            ids = torch.from_numpy(tokens[segments == segment]).long()[None]
            with torch.no_grad():
                alone = model(ids, output_hidden_states=True).hidden_states[2][0]
            torch.testing.assert_close(stored[segments == segment], alone, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared > store.num_contexts


def test_joined_packing_in_bfloat16_equals_transformers_bit_for_bit(harvester: Harvester) -> None:
    store = harvester.harvest(
        "joined", packing="joined", store__dtype="bfloat16", hooks__sites="[resid_pre,resid_post]", batch_contexts=1
    )
    model = AutoModelForCausalLM.from_pretrained(harvester.model, attn_implementation="sdpa").eval()
    for context in range(store.num_contexts):
        with torch.no_grad():
            ids = torch.from_numpy(store.tokens([context])).long()
            states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        for hook, state in (("resid_pre", states[1]), ("resid_post", states[2])):
            assert torch.equal(store.read_context(f"layers.1.{hook}", context), state[0].bfloat16())


def test_a_bfloat16_model_and_an_int8_store(harvester: Harvester) -> None:
    exact = harvester.harvest("exact", model__dtype="bfloat16", store__dtype="bfloat16")
    coarse = harvester.harvest("coarse", model__dtype="bfloat16", store__dtype="int8")
    hook = "layers.1.resid_post"
    wanted, got = (torch.stack([s.read_context(hook, c).float() for c in range(4)]) for s in (exact, coarse))
    error = (wanted - got).norm() / wanted.norm()
    assert 0 < error < 0.02
    assert exact.plan.provenance["model"]["dtype"] == "bfloat16"


def test_the_real_model_as_its_maker_described_it(harvester: Harvester, realdata: Path) -> None:
    text = harvester.root / "stories.txt"
    stories = (realdata / "text/tinystories_train.txt").read_text().split("<|endoftext|>")[:60]
    text.write_text("<|endoftext|>\n".join(stories))
    store = harvester.harvest(
        "stories",
        model=realdata / "stories260K-hf",
        corpus__files=text,
        corpus__separator="'<|endoftext|>'",
        packing__seq_len=256,
        hooks__layers="0-3",
        store__heldout_fraction=0.1,
    )
    for layer, (norm, bos_norm) in enumerate([(3.4, 8.2), (5.0, 10.4), (6.9, 12.2), (9.7, 16.0)]):
        hook = f"layers.{layer}.resid_post"
        assert store.statistics(hook).mean_norm == pytest.approx(norm, rel=0.05)
        assert store.read_context(hook, 0)[0].norm().item() == pytest.approx(bos_norm, abs=0.06)


# Running it again


def test_the_same_command_finds_everything_done(harvester: Harvester, store: Store) -> None:
    before = store.digest()
    result = harvester.run(hooks__layers="all", hooks__sites="[" + ",".join(SITES) + "]")
    assert result.code == 0
    assert f"resuming  {store.num_contexts} contexts are in the store already" in result.stderr
    assert "harvested" not in result.stderr
    assert Store.open(store.url).digest() == before


def test_a_dry_run_writes_nothing(harvester: Harvester) -> None:
    known = harvester.run("dry", dry_run="true", corpus__contexts=8)
    counted = harvester.run("dry", dry_run="true")
    for result in (known, counted):
        assert result.code == 0
        assert "layers.1.resid_post; d_model 16" in result.stderr
    assert "contexts  8 x 32 = 256 tokens" in known.stderr
    assert not (harvester.root / "dry").exists()


def test_killed_and_run_again_gives_the_same_bytes(harvester: Harvester) -> None:
    changes = {"store__shard_contexts": 1, "corpus__shuffle": "true", "corpus__shuffle_window": 5}
    whole = harvester.harvest("whole", **changes)
    assert whole.num_shards > 20
    process = harvester.server.start("stage_harvest", *harvester.arguments("killed", **changes))
    manifest = harvester.root / "killed" / "manifest"
    deadline = time.monotonic() + 120
    while not (manifest.is_dir() and any(manifest.glob("*.json"))) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(Store.open(harvester.root / "killed").committed()) < whole.num_shards
    result = harvester.run("killed", **changes)
    assert result.code == 0, result.stderr
    assert "contexts are in the store already" in result.stderr
    assert same_files(harvester.root / "whole", harvester.root / "killed") > 3 * whole.num_shards


@pytest.mark.slow
def test_killed_while_tokenising_goes_on_from_there(harvester: Harvester) -> None:
    """Several batches of documents, of each of which one context is taken."""
    rng = np.random.default_rng(1)
    words = rng.choice(["value", "return", "self", "class", "x"], (240, 6000))
    corpus = harvester.root / "long.txt"
    corpus.write_text("\n---\n".join(" ".join(document) for document in words))
    spools = harvester.root / "spools"  # those of failed harvests stay, for the next run
    changes = {
        "spool_dir": spools,
        "corpus__files": corpus,
        "packing__long_documents": "truncate",
        "packing__bos": "document",
        "store__shard_contexts": 120,
        "batch_contexts": 40,
        "tokenise_workers": 2,
    }
    process = harvester.server.start("stage_harvest", *harvester.arguments("torn", **changes))
    deadline = time.monotonic() + 120
    while not (kept := list(spools.glob("spool-*/encoded/*.npy"))[4:]) and time.monotonic() < deadline:
        time.sleep(0.001)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert kept
    assert not (harvester.root / "torn" / "zarr.json").exists()
    assert workers
    assert psutil.wait_procs(workers, timeout=20)[1] == []  # none outlives its parent
    result = harvester.run("torn", **changes)
    assert result.code == 0, result.stderr
    reused = re.search(r"resuming +(\d+) batches of documents were tokenised by an earlier run", result.stderr)
    assert reused is not None, result.stderr
    assert 1 <= int(reused[1]) < 9
    assert not list(spools.glob("spool-*"))
    harvester.harvest("untorn", **{**changes, "tokenise_workers": 0})
    assert Store.open(harvester.root / "torn").num_contexts == 240
    same_files(harvester.root / "untorn", harvester.root / "torn")


def test_a_mixture_from_the_command_line(harvester: Harvester) -> None:
    (harvester.root / "b.jsonl").write_text("\n".join(json.dumps({"body": f"zebra {i}"}) for i in range(400)))
    parts = (
        f"{{words: {{kind: text, files: {harvester.corpus}, separator: '---', weight: 1}},"
        " animals: {kind: jsonl, files: b.jsonl, field: body, weight: 3}}"
    )
    changes = {"corpus": "mixture", "corpus__files": None, "corpus__separator": None, "corpus__contexts": 20}
    store = harvester.harvest("mixed", **changes, corpus__parts=parts)
    tokenizer = load_tokenizer(str(harvester.model))
    tokens, mask, segments = (f(range(20)) for f in (store.tokens, store.mask, store.segments))
    animals = 0
    for context in range(20):
        for segment in range(segments[context].max() + 1):
            chosen = (segments[context] == segment) & mask[context]
            animals += chosen.sum() if "zebra" in tokenizer.decode(tokens[context][chosen]) else 0
    assert animals / mask.sum() == pytest.approx(0.75, abs=0.06)
    assert store.plan.provenance["corpus"]["description"].startswith("mixture: 0.25 text: corpus.txt")


# What is refused


def test_nan_stops_the_shard_and_says_where(harvester: Harvester) -> None:
    good = harvester.harvest("one")
    tokens = good.tokens(range(good.num_contexts))
    in_shard_2 = tokens[8:12]
    poison = next(int(token) for token in in_shard_2.ravel() if not (tokens[:8] == token).any())
    context, position = np.argwhere(tokens == poison)[0]
    weights = load_file(harvester.model / "model.safetensors")
    weights["model.embed_tokens.weight"][poison] = float("nan")
    shutil.copytree(harvester.model, harvester.root / "poisoned", dirs_exist_ok=True)
    save_file(weights, harvester.root / "poisoned" / "model.safetensors", {"format": "pt"})
    result = harvester.run("nan", model=harvester.root / "poisoned")
    assert result.code == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"error: layers.1.resid_post: context {context}, position {position} is NaN"), line
    assert "Traceback" not in result.stderr
    assert context // 4 not in Store.open(harvester.root / "nan").committed()


def test_a_store_of_another_harvest_is_left_alone(harvester: Harvester) -> None:
    before = harvester.harvest("one").digest()
    for changes, difference in (
        ({"batch_contexts": 1}, "provenance.batch_contexts is 2, not 1"),
        ({"packing": "joined"}, "provenance.packing.mode is isolated, not joined"),
        ({"corpus__contexts": 7}, "provenance.corpus.contexts is absent, not 7"),
    ):
        error = harvester.run("one", **changes).error
        assert "holds another harvest" in error
        assert difference in error
    assert Store.open(harvester.root / "one").digest() == before


def test_a_model_without_that_hook(harvester: Harvester) -> None:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_experts=2,
        num_experts_per_tok=1,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    folder = make_model(harvester.root / "moe", Qwen3MoeForCausalLM(config))
    error = harvester.run("moe-store", model=folder, hooks__sites="[mlp_out]").error
    assert "attention and MLP hooks are known for llama" in error
    assert "not for qwen3_moe" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./nowhere"}, "no model folder at ./nowhere: give a folder"),
        ({"model": "someone/unknown"}, "model 'someone/unknown' is neither a folder here nor in the hub's local cache"),
        ({"hooks__layers": "2,3"}, "layer 3 is not in the model: it has 3 layers, 0 to 2"),
        ({"packing__seq_len": "8,16"}, "packing.seq_len=8,16 is a sweep: add -m, or write packing.seq_len=[8,16]"),
        ({"store__url": "memory://store"}, "store.url=memory://store: nothing of it would outlive this process"),
        ({"chat__date": "today"}, "chat.date=today: write the day as 2026-11-26"),
        ({"packing__mask_first": 32}, "packing.mask_first=32: it must be at least 0 and below packing.seq_len"),
        ({"hooks__layers": "[0,2-3]"}, "layer 3 is not in the model: it has 3 layers, 0 to 2"),
        ({"hooks__sites": "[resid]"}, "unknown hook site 'resid': choose from resid_pre"),
        ({"hooks__sites": "[]"}, "hooks.sites is empty"),
        ({"packing__seq_len": 128}, "packing.seq_len=128, but the model has 64 positions: set packing.seq_len=64"),
        ({"packing__seq_len": 1}, "packing.seq_len=1: a context needs at least 2 tokens"),
        ({"corpus__files": "nothing/*.txt"}, "no file matches corpus.files=nothing/*.txt"),
        ({"corpus__files": "empty.txt"}, "empty.txt is empty"),
        ({"corpus__files": "latin.txt"}, "latin.txt is not UTF-8 at byte 3"),
        ({"corpus__files": "torn.txt.gz"}, "torn.txt.gz can't be read to its end: Compressed file ended before"),
        (
            {"corpus": "jsonl", "corpus__separator": None, "corpus__files": "x.jsonl"},
            "has no field 'text': there are body",
        ),
        ({"corpus__contexts": 5000}, "the corpus ends early: it fills 27 contexts of 32 tokens, 5000 were asked for"),
        ({"corpus__contexts": 0}, "corpus.contexts=0: it must be at least 1"),
        ({"corpus__shuffle": "true", "corpus__shuffle_window": 0}, "corpus.shuffle_window=0"),
        ({"corpus__contexts": 10**12}, "PB, but only"),
        ({"store__dtype": "float8"}, "store dtype 'float8' is not known: choose from bfloat16"),
        ({"store__shard_contexts": 100}, "none can be held out"),
        ({"store__url": "/proc/nowhere/store"}, "/proc/nowhere"),
        ({"batch_contexts": 0}, "batch_contexts=0: it must be at least 1"),
        ({"spool_dir": "/proc/nowhere"}, "no spool folder under /proc/nowhere"),
        ({"tokenise_workers": -1}, "tokenise_workers=-1: it must be at least 0"),
        ({"corpus__files": "blank.txt"}, "(text: blank.txt, 9 bytes) fills no context of 32 tokens"),
        (
            {"corpus": "parquet", "corpus__separator": None, "corpus__files": "x.parquet"},
            "has no column 'text': there are body",
        ),
        ({"corpus": "jsonl", "corpus__separator": None, "corpus__files": "lone.jsonl"}, "half of a surrogate pair"),
        ({"packing": "loose"}, "no option 'loose' in group 'packing': choose from isolated, joined"),
        ({"packing__bos": "never"}, "packing.bos"),
        ({"corpus__file": "x"}, "unknown configuration key 'corpus.file' (did you mean 'corpus.files'?)"),
        ({"corpus__files": None}, "corpus.files has no value"),
    ],
)
def test_a_wrong_input_is_one_line(harvester: Harvester, changes: dict[str, object], message: str) -> None:
    (harvester.root / "empty.txt").write_bytes(b"")
    (harvester.root / "latin.txt").write_bytes(b"caf\xe9")
    (harvester.root / "torn.txt.gz").write_bytes(gzip.compress(b"text")[:-4])
    (harvester.root / "blank.txt").write_text("\n---\n---\n")
    (harvester.root / "lone.jsonl").write_text('{"text": "half a pair: \\ud800"}\n')
    pq.write_table(pa.table({"body": ["text"]}), harvester.root / "x.parquet")
    (harvester.root / "x.jsonl").write_text('{"body": "text"}\n')
    result = harvester.run("refused", **changes)
    last = result.stderr.splitlines()[-1]
    assert result.code == 2, result.stderr
    assert last.startswith("error: "), result.stderr
    assert message in last
    assert "Traceback" not in result.stderr
    assert not (harvester.root / "refused" / "zarr.json").exists()
