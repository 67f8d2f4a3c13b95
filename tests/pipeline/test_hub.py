"""Publishing on, and loading from, a hub that is a real server on this machine; and the names of public releases."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import granary
from granary import GranaryError, SAEConfig
from granary.hub import main, push_to_hub
from shared.sae import SAE, load
from shared.sae.loading import convert
from shared.sae.releases import is_named, place_of, table
from shared.store import Store
from shared.store.io.base import ObjectShortError
from shared.store.io.open import open_io
from tests.foreign import write_dictionary_learning, write_gemma_scope, write_llama_scope
from tests.hub import TOKEN, Hub, serving
from tests.inspection import HOOK, inspect_config, small_sae, small_store

# How huggingface_hub calls httpx when it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process talks to, with a token it knows."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,  # which speaks to another server
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        yield hub


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trained(folder: Path) -> SAE:
    """An SAE on disk that says where it comes from."""
    sae = SAE(SAEConfig(d_model=6, d_latent=24, k=3))
    model = {"id": "meta-llama/Llama-3.1-8B", "dtype": "bfloat16", "revision": None}
    sae.save_pretrained(folder, {"model": model, "tokens": 1000, "steps": 10, "config": {"sae.k": 3, "name": "<b>|"}})
    return sae


def front(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_published_dictionary_is_loaded_back_and_says_what_it_is(hub: Hub, tmp_path: Path) -> None:
    sae = trained(tmp_path / "run/sae")
    address = push_to_hub(tmp_path / "run/sae", "me/mine", private=True)
    assert address == f"{hub.url}/me/mine"
    assert hub.private["models/me/mine"]
    assert sorted(hub.files["models/me/mine"]) == ["README.md", "config.json", "sae.safetensors"]
    assert len(hub.commits) == 1
    card = hub.files["models/me/mine"]["README.md"].decode()
    assert front(card)["base_model"] == "meta-llama/Llama-3.1-8B"
    assert "| Latents | 24 |" in card
    assert "Not scored" in card
    assert "load('me/mine')" in card
    assert torch.equal(load("me/mine").W_enc, sae.W_enc)
    push_to_hub(tmp_path / "run/sae", "me/mine", path_in_repo="layers.3")
    assert "load('hf://me/mine/layers.3')" in hub.files["models/me/mine"]["layers.3/README.md"].decode()
    assert torch.equal(load("hf://me/mine/layers.3").W_dec, sae.W_dec)


def test_scores_are_published_with_the_weights_that_they_are_of_alone(hub: Hub, tmp_path: Path) -> None:
    small_store(tmp_path / "run/store", num_contexts=9)
    small_sae(tmp_path / "run/sae")
    granary.evaluate(run_dir=tmp_path / "run", downstream=False, **{"device.name": "cpu", "split": "all"})
    push_to_hub(tmp_path / "run/sae", "me/scored")
    files = hub.files["models/me/scored"]
    card = files["README.md"].decode()
    fvu = json.loads(files["eval.json"])["fvu"]
    assert f"| FVU | {fvu:.4g} (" in card
    assert "Loss recovered" not in card  # which was not measured
    pictures = [name for name in files if name.startswith("plots/")]
    assert pictures
    assert all(f"({name})" in card for name in pictures)
    trained(tmp_path / "run/sae")  # other weights in the folder
    push_to_hub(tmp_path / "run/sae", "me/other")
    assert "eval.json" not in hub.files["models/me/other"]
    assert "Not scored" in hub.files["models/me/other"]["README.md"].decode()


def test_a_latents_folder_is_published_without_its_notes(hub: Hub, tmp_path: Path) -> None:
    small_store(tmp_path / "store", num_contexts=9)
    small_sae(tmp_path / "sae")
    folder = Path(granary.inspect(inspect_config(tmp_path)).url)
    (folder / "notes.sqlite").write_bytes(b"mine")
    push_to_hub(folder, "me/latents")
    sent = hub.files["datasets/me/latents"]
    here = files_of(folder)
    assert {name: data for name, data in sent.items() if name != "README.md"} == {
        name: data for name, data in here.items() if not name.startswith(("notes.sqlite", "parts/"))
    }
    (folder / "notes.sqlite").unlink()
    local, remote = granary.Latents.open(folder), granary.Latents.open("hf://datasets/me/latents")
    assert "Latents.open('hf://datasets/me/latents')" in sent["README.md"].decode()
    for name in local.table:
        assert np.array_equal(remote.table[name], local.table[name], equal_nan=True), name
    assert [str(one) for one in remote.top(7, 3)] == [str(one) for one in local.top(7, 3)]
    assert remote.latent(7).tokens == local.latent(7).tokens
    with pytest.raises(GranaryError, match="only read: granary push"):
        remote.io.put("mine", [b"x"])


def test_a_store_is_read_from_the_hub_in_ranges_and_at_one_commit(hub: Hub, tmp_path: Path) -> None:
    local = small_store(tmp_path / "store", num_contexts=9)
    hub.files["datasets/me/data"] = {f"stores/{name}": data for name, data in files_of(tmp_path / "store").items()}
    remote = Store.open("hf://datasets/me/data/stores")
    context = int(local.contexts("heldout")[0])
    assert torch.equal(remote.read_context(HOOK, context), local.read_context(HOOK, context))
    ranges = [asked for name, asked in hub.read if name.startswith(f"stores/{HOOK.replace('.', '/')}")]
    assert ranges
    assert all(ranges)  # never a whole shard
    io = open_io("hf://datasets/me/data/stores")
    assert io.size("_COMPLETE.json")
    with pytest.raises(ObjectShortError):
        io.read_into("_COMPLETE.json", 3, [memoryview(bytearray(1 << 20))])
    hub.files["datasets/me/data"] = {}
    assert io.size("_COMPLETE.json")  # as it was when the repository was opened


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("hf://datasets/me/none", "there is no such repository, revision or file, or it is not yours"),
        ("hf://datasets/me", "names no repository: write hf://datasets/owner/name"),
        ("hf://datasets/me/a b", "names no repository"),
        ("hf://me/x/latents", "no latents folder at hf://me/x/latents"),
    ],
)
def test_what_the_hub_has_not_is_one_line_at_once(hub: Hub, url: str, line: str) -> None:
    hub.add("me/x", {"config.json": b"{}"})
    with pytest.raises(GranaryError, match=line):
        granary.Latents.open(url)


@pytest.mark.parametrize(
    ("folder", "repo", "line"),
    [
        ("sae", "a/b/c", "a/b/c: Repo id"),
        ("sae", "me/x", "the hub did not take me/x: .*; hf auth login, or --token"),
        ("", "me/x", "is no folder of a dictionary, nor of what latents do; push .*sae"),
        ("nothing", "me/x", "nothing is no folder of a dictionary"),
    ],
)
def test_what_cannot_be_published_is_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, repo: str, line: str
) -> None:
    trained(tmp_path / "sae")
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(GranaryError, match=line):
        push_to_hub(tmp_path / folder, repo)
    assert not hub.files


def test_a_card_alone_needs_no_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "sae")
    main([str(tmp_path / "sae"), "me/x", "--card"])
    assert capsys.readouterr().out.startswith("---\nlibrary_name: granary\n")


def test_releases_of_each_family_are_loaded_by_their_names(hub: Hub, tmp_path: Path) -> None:
    trained(tmp_path / "sae")
    for name, write in {
        "gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82": lambda to: write_gemma_scope(to, 1),
        "gemma-scope-2-4b-pt-res:layer_17_width_16k_l0_big": lambda to: write_gemma_scope(to, 2),
        "gpt2-small-res-jb:blocks.0.hook_resid_pre": lambda to: convert(tmp_path / "sae", to, "saelens"),
        "llama_scope_lxr_8x:l5r_8x": write_llama_scope,
        "opensae-llama-3.1-layer_08:layers.8.resid_post": lambda to: convert(tmp_path / "sae", to, "opensae"),
        "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109:blocks.12.hook_resid_post__trainer_0": lambda to: (
            write_dictionary_learning(to, "AutoEncoderTopK")
        ),
    }.items():
        owner, repository, *inside = place_of(name).removeprefix("hf://").split("/")
        made = tmp_path / "made" / repository / Path(*inside)
        made.parent.mkdir(parents=True, exist_ok=True)
        write(made)
        where = "/".join(inside)
        hub.add(f"{owner}/{repository}", {f"{where}/{one}".lstrip("/"): data for one, data in files_of(made).items()})
        found, local = load(name), load(made)
        assert type(found) is type(local), name
        assert torch.equal(found.W_dec, local.W_dec), name
    assert load("gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82").config.sites is not None


def test_the_table_of_releases_names_places_and_the_nearest_names() -> None:
    assert len(table()) > 150
    assert sum(map(len, table().values())) > 12_000
    assert all(place.startswith("hf://") and ".." not in place for saes in table().values() for place in saes.values())
    for name, is_release in {"a:b": True, "s3://a/b": False, "hf://a/b": False, "a/b:c": False, ":b": False}.items():
        assert is_named(name) is is_release, name
    with pytest.raises(GranaryError, match=r"no release gemma-scope-2b-pt-re: did you mean gemma-scope-2b-pt-res or "):
        load("gemma-scope-2b-pt-re:x")
    with pytest.raises(
        GranaryError, match=r"has no dictionary blocks\.0\.hook_resid_prex: did you mean blocks\.0\.hook_"
    ):
        load("gpt2-small-res-jb:blocks.0.hook_resid_prex")
