"""A stranger's pickle in the place of any file that is read runs nothing, nor does code beside a model."""

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shared.basics.errors import GranaryError
from shared.lm import load_causal_lm, load_tokenizer
from shared.lm.identity import load_config
from shared.sae import SAE
from shared.sae.loading import load_any
from shared.store import Store
from shared.store.verify import verify
from stage_train.state.checkpoint import intact_checkpoint, read_state
from stage_train.state.export import export
from stage_train.state.integrity import fault_of
from stage_train.state.settle import identity_in
from stage_train.state.tensor_files import load_tensors
from tests.foreign import (
    write_dictionary_learning,
    write_gemma_scope,
    write_llama_scope,
    write_opensae,
    write_saelens,
)
from tests.synthetic import synthetic_plan, synthetic_store
from tests.training import Runs, weights


class Payload:
    """Makes a folder where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Is there when code has run."""
    return tmp_path / "code-ran"


@pytest.fixture
def payloads(mark: Path, tmp_path: Path) -> list[bytes]:
    """As a bare pickle, as torch saves one, beside tensors, and as an array of objects."""
    torch.save(Payload(mark), tmp_path / "a.pt")
    torch.save({"W_enc": torch.zeros(2, 2), "extra": Payload(mark)}, tmp_path / "b.pt")
    np.save(tmp_path / "c.npy", np.array([Payload(mark)], object), allow_pickle=True)
    np.savez(tmp_path / "d.npz", W_enc=np.array([Payload(mark)], object))
    files = [(tmp_path / name).read_bytes() for name in ("a.pt", "b.pt", "c.npy", "d.npz")]
    return [pickle.dumps(Payload(mark)), *files]


def test_the_payload_is_one(mark: Path, payloads: list[bytes]) -> None:
    pickle.loads(payloads[0])
    assert mark.is_dir()


def try_all(paths: list[Path], payloads: list[bytes], mark: Path, *readers: Callable[[], object]) -> None:
    """Each payload in the place of each file (or beside the others, where there is none), for each reader."""
    for path in paths:
        before = path.read_bytes() if path.is_file() else None
        for payload in payloads:
            path.write_bytes(payload)
            for read in readers:
                with suppress(GranaryError):
                    read()
                assert not mark.exists(), (path, read)
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)


@pytest.mark.usefixtures("train_configs")
def test_files_of_a_run(train: Runs, mark: Path, payloads: list[bytes]) -> None:
    out = train("a")
    step = out / "checkpoints/step-00000042"
    tensors = {f"sae.{name}": torch.empty_like(tensor) for name, tensor in weights(out).items()}
    names = ("tensors-00000.safetensors", "training.json", "digests.json", ".metadata", "__0_0.distcp", "x.safetensors")
    try_all(
        [*(step / name for name in names), out / "checkpoints/latest"],
        payloads,
        mark,
        lambda: fault_of(step),
        lambda: intact_checkpoint(out / "checkpoints"),
        lambda: read_state(step),
        lambda: load_tensors(step, tensors),
        lambda: identity_in(out),
        lambda: export(step, out / "again"),
    )
    try_all(
        [out / "config.json", out / "sae.safetensors", out / "train.yaml"],
        payloads,
        mark,
        lambda: SAE.from_pretrained(out),
        lambda: load_any(out),
        lambda: identity_in(out),
    )
    (out / "train.yaml").write_text(f"a: !!python/object/apply:os.mkdir [{mark}]")
    shutil.rmtree(out / "checkpoints")
    assert identity_in(out) == {}
    assert not mark.exists()


@pytest.mark.usefixtures("train_configs")
def test_a_checkpoint_of_the_pickled_layout_is_one_line(train: Runs, mark: Path, payloads: list[bytes]) -> None:
    """The layout that torch.distributed.checkpoint has by itself; its index is never opened."""
    out = train("a", "checkpoint.keep=2", "checkpoint.every=20")
    newest, older = (out / f"checkpoints/step-000000{step}" for step in (42, 40))
    (newest / ".metadata").write_bytes(payloads[0])
    assert intact_checkpoint(out / "checkpoints") == older
    (older / "digests.json").unlink()
    with pytest.raises(GranaryError, match=r"older layout whose index is a pickle.*checkpoint\.resume=never"):
        train("a", "checkpoint.keep=2", "checkpoint.every=20", "schedule.tokens=900")
    assert not mark.exists()


def test_files_of_a_store(tmp_path: Path, mark: Path, payloads: list[bytes]) -> None:
    url = tmp_path / "store"
    synthetic_store(url, synthetic_plan(num_contexts=5, seq_len=8, d_model=4, shard_contexts=2, chunk_tokens=4))
    patterns = ("zarr.json", "extents/*0.json", "extents/*.tokens.json", "manifest/*1.json", "_COMPLETE.json")
    objects = ("tokens/c/1/0", "mask/c/1/0", "layers/**/c/1/0/0", "statistics/**/c/1/0/0")
    paths = [next(iter(sorted(url.glob(pattern)))) for pattern in (*patterns, *objects)]

    def read() -> None:
        store = Store.open(url)
        for hook in store.hooks:
            store.statistics(hook)
            for context in store.contexts("all"):
                store.read_context(hook, int(context))
        store.mask(range(store.num_contexts))
        store.tokens(range(store.num_contexts))
        store.summary()

    try_all(paths, payloads, mark, read, lambda: verify(str(url)))


def test_files_of_foreign_folders(tmp_path: Path, mark: Path, payloads: list[bytes]) -> None:
    write_saelens(tmp_path / "saelens")
    write_opensae(tmp_path / "opensae", normalise=True, shift_back=False, shards=True)
    write_dictionary_learning(tmp_path / "dictionary_learning", "AutoEncoderTopK")
    write_llama_scope(tmp_path / "llama_scope")
    write_gemma_scope(tmp_path / "gemma_scope", 1)
    write_gemma_scope(tmp_path / "gemma_scope_2", 2)
    for folder in [path for path in sorted(tmp_path.iterdir()) if path.is_dir()]:
        load_any(folder)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        try_all(paths, payloads, mark, lambda folder=folder: load_any(folder))


def test_code_beside_a_model(tmp_path: Path, mark: Path, payloads: list[bytes]) -> None:
    """Neither what ``auto_map`` names, whatever is answered to the question, nor pickled weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    code = f"import os\nos.mkdir({str(mark)!r})\n"
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py"):
        (folder / name).write_text(code)
    mapping = {
        "AutoConfig": "configuration_x.Config",
        "AutoModelForCausalLM": "modeling_x.Model",
        "AutoModel": "modeling_x.Model",
    }
    tokenizers = {"AutoTokenizer": [None, "tokenization_x.Tokenizer"]}
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "X", "auto_map": tokenizers}))
    (folder / "tokenizer.json").write_text("{}")
    for model_type, weights_file in (("x", None), ("llama", None), ("llama", "pytorch_model.bin"), ("llama", "pt")):
        config = {"model_type": model_type, "architectures": ["Model"], "vocab_size": 8, "auto_map": mapping, **shape}
        (folder / "config.json").write_text(json.dumps(config))
        for payload in payloads:
            if weights_file == "pt":
                save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
            elif weights_file is not None:
                (folder / weights_file).write_bytes(payload)
            for read in (load_config, load_causal_lm, load_tokenizer):
                with suppress(GranaryError, OSError):  # OSError: there are no weights that may be read
                    read(str(folder))
                assert not mark.exists(), (model_type, weights_file, read)
