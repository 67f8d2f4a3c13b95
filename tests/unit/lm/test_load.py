"""Loading: the trunk is the whole model's beginning and nothing more; identities; and what is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, Gemma2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from shared.basics.errors import GranaryError
from shared.lm import (
    capture,
    load_causal_lm,
    load_config,
    load_tokenizer,
    load_trunk,
    model_identity,
    resolve_model,
    special_ids,
    tokenizer_hash,
)
from shared.lm.hookpoint import HookPoint
from tests.cached import cache_in
from tests.families import HEADS

IDS = torch.tensor([[3, 9, 4, 7]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_trunk_is_the_models_beginning(folder: Path) -> None:
    post = HookPoint(1, "resid_post")
    whole = load_causal_lm(str(folder))
    with capture(whole, [post]) as wanted:
        whole(IDS)
    trunk = load_trunk(str(folder), num_layers=2)
    assert torch.equal(trunk(IDS).last_hidden_state, wanted[post])
    names = [name for name, _ in trunk.named_parameters()]
    assert {name.split(".")[1] for name in names if name.startswith("layers")} == {"0", "1"}
    assert not [name for name in names if "lm_head" in name or name.startswith("norm")]
    assert not any(parameter.requires_grad for parameter in trunk.parameters())


def test_nothing_deeper_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str) -> None:
        forward: Callable[..., object] = getattr(modeling_llama, name).forward
        monkeypatch.setattr(
            getattr(modeling_llama, name), "forward", lambda *args, **kw: calls.append(name) or forward(*args, **kw)
        )

    trunk = load_trunk(str(folder), num_layers=2, last_mlp=False)
    for name in ("LlamaDecoderLayer", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm"):
        counted(name)
    with capture(trunk, [HookPoint(1, "attn_out")]) as got:
        output = trunk(IDS)
    assert {name: calls.count(name) for name in set(calls)} == {
        "LlamaDecoderLayer": 2,
        "LlamaAttention": 2,
        "LlamaMLP": 1,
        "LlamaRMSNorm": 4,
    }
    assert cache_in(output) is None
    whole = load_causal_lm(str(folder))
    with capture(whole, list(got)) as wanted:
        whole(IDS)
    assert torch.equal(got[HookPoint(1, "attn_out")], wanted[HookPoint(1, "attn_out")])


def test_dtype_and_attention(folder: Path, tmp_path: Path) -> None:
    assert load_trunk(str(folder), "bfloat16", num_layers=1).dtype == torch.bfloat16
    with pytest.raises(GranaryError, match=r"tiny-llama can't be loaded.*no_such_attention"):
        load_trunk(str(folder), num_layers=1, attn_implementation="no_such_attention")
    config = Gemma2Config(**HEADS)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert load_trunk(str(tmp_path), num_layers=1).config._attn_implementation == "eager"  # softcapping


@pytest.mark.parametrize(("scheme", "tolerance"), [("torchao_int8", 0.02), ("bnb_int8", 0.1), ("bnb_nf4", 0.3)])
@pytest.mark.filterwarnings("ignore")  # of those packages' own
def test_quantised_weights(tmp_path: Path, scheme: str, tolerance: float) -> None:
    pytest.importorskip("torchao" if scheme.startswith("torchao") else "bitsandbytes")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    wanted = load_trunk(str(tmp_path), "bfloat16", num_layers=1)(IDS).last_hidden_state.float()
    trunk = load_trunk(str(tmp_path), "bfloat16", num_layers=1, quantisation=scheme)
    got = trunk(IDS).last_hidden_state.float()
    assert 0 < (got - wanted).norm() < tolerance * wanted.norm()


def test_a_quantisation_that_cannot_be_had(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GranaryError, match=r"model\.quantisation=int3: choose from bnb_int8, bnb_nf4, torchao_int8"):
        load_trunk(str(folder), num_layers=1, quantisation="int3")
    for absent, scheme, package in (
        ("accelerate", "bnb_nf4", "bitsandbytes"),
        ("bitsandbytes", "bnb_int8", "bitsandbytes"),
        ("torchao.quantization", "torchao_int8", "torchao"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, absent, None)
            with pytest.raises(GranaryError, match=f"{scheme} needs {package} and accelerate: pip"):
                load_trunk(str(folder), num_layers=1, quantisation=scheme)


def test_missing_weights_are_named(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    load_trunk(str(tmp_path), num_layers=1)
    with pytest.raises(GranaryError, match=r"lack 1 of the weights, layers\.1\.mlp\.up_proj\.weight"):
        load_trunk(str(tmp_path), num_layers=2)
    with pytest.raises(GranaryError, match=r"9 layers asked of model .*which has 4"):
        load_trunk(str(tmp_path), num_layers=9)


def test_identity_follows_the_content(folder: Path, tmp_path: Path) -> None:
    identity = model_identity(str(folder))
    assert identity["id"] == "tiny-llama"
    assert identity["revision"] is None
    moved = tmp_path / "tiny-llama"
    moved.mkdir()
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    assert model_identity(str(moved)) == identity
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert model_identity(str(moved))["config_hash"] != identity["config_hash"]
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    assert model_identity(str(moved))["weights_hash"] != identity["weights_hash"]
    assert model_identity(str(moved), dtype="bfloat16")["dtype"] == "bfloat16"


def test_large_weights_are_known_by_headers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.lm.identity.FULL_HASH_BYTES", 10)
    opened = model_identity(str(folder))["weights_hash"]
    assert opened == model_identity(str(folder))["weights_hash"]
    monkeypatch.undo()
    assert opened != model_identity(str(folder))["weights_hash"]


def test_what_is_no_model_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GranaryError, match=r"no model folder at \./models/llama"):
        resolve_model("./models/llama")
    with pytest.raises(GranaryError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(GranaryError, match=r"holds no \*\.safetensors"):
        resolve_model(str(tmp_path))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(GranaryError, match="is a t5, not a causal language model"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    with pytest.raises(GranaryError, match="is multimodal"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llamma"}))
    with pytest.raises(GranaryError, match=r"can't read its config\.json.*llamma"):
        load_config(str(tmp_path))
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(GranaryError, match=r"has no tokenizer: .* holds none of tokenizer\.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            LocalEntryNotFoundError("offline"),
            "neither a folder here nor in the hub's local cache, and the hub can't be",
        ),
        (RepositoryNotFoundError, "neither a folder here nor on the Hugging Face hub"),
        (GatedRepoError, "is gated: accept its licence"),
    ],
)
def test_an_unreachable_hub_is_one_line(
    error: Exception | type[Exception], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> str:
        if isinstance(error, Exception):
            raise error
        raise error.__new__(error)  # these want an HTTP response; nobody reads it

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(GranaryError, match=line) as caught:
        resolve_model("someone/llama")
    assert "\n" not in str(caught.value)


def test_bundled_tokenizer() -> None:
    tokenizer = load_tokenizer("bundled")
    special = special_ids(tokenizer)
    assert (special.bos, special.eos, special.pad) == (tokenizer.bos_token_id, tokenizer.eos_token_id, special.eos)
    assert special.all == tuple(sorted(tokenizer.all_special_ids))
    assert model_identity("bundled")["id"] == "bundled"
    before = tokenizer_hash(tokenizer)
    tokenizer.split_special_tokens = not tokenizer.split_special_tokens
    assert tokenizer_hash(tokenizer) != before
