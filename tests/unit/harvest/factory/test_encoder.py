"""Encoders of text: the documents that a plain loop over them would run, with their tokens and what is masked."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

import granary
from shared.basics.errors import GranaryError
from shared.lm import capture
from shared.lm.encoders import ids_around, is_encoder, most_positions
from shared.lm.modulepoint import ModulePoint
from shared.lm.recorded import without_next_token
from shared.store import Store
from stage_harvest.config import BosPlacement, LongDocuments, PackingMode

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "def", "return", "x", "y", "self", "of", "the", "a"]
TEXTS = ["def x of the a", "return self", "the a of the a of the a of the a of", "x"]
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 12,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
    "sep_token_id": 2, "initializer_range": 0.4,
}  # fmt: skip
T5 = T5Config(
    d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=12, pad_token_id=0, eos_token_id=2,
    decoder_start_token_id=0, initializer_factor=2.0,
)  # fmt: skip
MODELS: dict[str, tuple[Any, str, tuple[list[int], list[int]]]] = {
    "bert": (lambda: BertForMaskedLM(BertConfig(**SMALL)), "encoder.layer.1.output", ([1], [2])),
    "modernbert": (
        lambda: ModernBertForMaskedLM(ModernBertConfig(**SMALL, local_attention=4)), "layers.1.mlp", ([1], [2])
    ),
    "roberta": (lambda: RobertaForMaskedLM(RobertaConfig(**SMALL)), "encoder.layer.0", ([1], [2])),
    "t5": (lambda: T5ForConditionalGeneration(T5), "block.1.layer.0:out[0]", ([], [2])),
}  # fmt: skip


def tokenizer(around: tuple[list[int], list[int]]) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    single = " ".join([*(WORDS[one] for one in around[0]), "$A", *(WORDS[one] for one in around[1])])
    special = [(WORDS[one], one) for one in (*around[0], *around[1])]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


def saved(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    make, _, around = MODELS[name]
    make().save_pretrained(folder / name)
    tokenizer(around).save_pretrained(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def composed() -> Any:
    """A configuration that each harvest changes a copy of."""
    given = {
        "corpus": "jsonl", "corpus.files": "?", "packing.seq_len": 8, "store.dtype": "float32",
        "store.shard_contexts": 2, "store.heldout_fraction": 0,
    }  # fmt: skip
    return granary.configure("harvest", **given)


def harvest(composed: Any, folder: Path, name: str, **settings: Any) -> Store:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    cfg = copy.deepcopy(composed)
    cfg.run_dir, cfg.store.url, cfg.spool_dir = str(folder / "run"), str(folder / "store"), str(folder)
    cfg.model.path, cfg.corpus.files, cfg.hooks.modules = (
        str(folder / name),
        str(folder / "texts.jsonl"),
        MODELS[name][1],
    )
    for key, value in settings.items():
        group, _, field = key.rpartition("__")
        setattr(getattr(cfg, group) if group else cfg, field, value)
    return granary.harvest(cfg)


@pytest.mark.parametrize(
    "name", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("modernbert", "roberta", "t5"))]
)
def test_each_document_has_the_activations_that_it_has_alone(composed: Any, tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, name)
    around, point = MODELS[name][2], ModulePoint.parse(MODELS[name][1])
    store = harvest(composed, tmp_path, name)
    assert without_next_token(store) == f"an encoder ({name})"
    if name == "t5":
        plain: Any = T5EncoderModel.from_pretrained(folder).eval().encoder
    else:
        plain = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager").base_model.eval()
    room = 8 - len(around[0]) - len(around[1])
    wanted, ids = [], []
    for text in TEXTS:
        bare = [WORDS.index(word) for word in text.split()]
        for start in range(0, len(bare), room):
            ids.append([*around[0], *bare[start : start + room], *around[1]])
            with torch.no_grad(), capture(plain, [point]) as captured:
                plain(input_ids=torch.tensor([ids[-1]]))
            wanted.append(captured[point][0])
    contexts = range(store.num_contexts)
    flat, total = np.concatenate(ids), sum(map(len, ids))
    tokens, segments, mask = (getattr(store, one)(contexts).reshape(-1) for one in ("tokens", "segments", "mask"))
    assert tokens[:total].tolist() == flat.tolist()
    assert mask[:total].tolist() == (~np.isin(flat, [0, 1, 2, 3])).tolist()
    assert (segments[total:] == -1).all()
    found = torch.cat([store.read_context(point.site, context) for context in contexts])[:total]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-5, atol=1e-5)
    bidirectional = found[0] if not around[0] else found[1]  # its first word hears of those behind it
    first = [*around[0], flat[len(around[0])], *around[1]]
    with torch.no_grad(), capture(plain, [point]) as captured:
        plain(input_ids=torch.tensor([first]))
    assert not torch.allclose(captured[point][0, len(around[0])], bidirectional)


def test_what_an_encoder_is_told(composed: Any, tmp_path: Path) -> None:
    saved(tmp_path, "bert")
    for settings, told in (
        ({"packing__mode": PackingMode.joined}, "is an encoder .bert., which sees a row whole"),
        ({"hooks__modules": None}, "no decoder is harvested here, so hooks.modules says"),
        ({"packing__seq_len": 2}, "no token has room beside the special ones"),
        ({"packing__mask_first": 1}, "are for decoders"),
        ({"model__quantisation": "bnb_nf4"}, "model.quantisation is for decoders"),
        ({"tensor_parallel": 2}, "tensor_parallel is for decoders"),
        ({"corpus__contexts": 9}, "which fill 4 contexts of packing.seq_len=8: 9 were asked for"),
    ):
        with pytest.raises(GranaryError, match=told):
            harvest(composed, tmp_path, "bert", **settings)
    assert not (tmp_path / "store").exists()
    bare = harvest(
        composed, tmp_path, "bert", packing__bos=BosPlacement.none, packing__long_documents=LongDocuments.truncate
    )
    length = [min(len(text.split()), 8) for text in TEXTS]
    assert sum(int((bare.segments([c]) >= 0).sum()) for c in range(bare.num_contexts)) == sum(length)


def test_what_an_encoder_is() -> None:
    assert is_encoder(BertConfig())
    assert is_encoder(T5Config())
    assert not is_encoder(BertConfig(is_decoder=True))
    assert not is_encoder(LlamaConfig())
    assert ids_around(tokenizer(([1], [2]))) == ([1], [2])
    assert ids_around(tokenizer(([], [2]))) == ([], [2])
    assert most_positions(BertConfig(**SMALL), tokenizer(([1], [2]))) == 16
    assert most_positions(RobertaConfig(**SMALL), None) == 15
    assert most_positions(T5Config(), None) is None
