"""Make shared/sae/releases.json.gz anew: ``.venv-peers/bin/python tests/peers/make_releases.py``, beside SAELens.

What is left out: layouts that this project does not read, lone pickles, and releases whose names change the function of
what the files hold (``config_overrides`` of the normalisation, another scale than the file's).
"""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[2] / "shared/sae/releases.json.gz"
# SAELens's names of how it reads a release, of those whose files shared.sae.formats reads as they are.
READ = (None, "gemma_2", "gemma_2_transcoder", "gemma_3", "llama_scope", "dictionary_learning_1")
HARMLESS = {"model_from_pretrained_kwargs", "dataset_path"}
PICKLES = (".pt", ".pth", ".bin")
OPENSAE_LAYERS = 32


def releases() -> dict[str, dict[str, Any]]:
    """Repository, model and folder of each dictionary, by release and id."""
    import yaml

    package = find_spec("sae_lens")
    assert package is not None
    assert package.origin is not None
    known = yaml.safe_load(Path(package.origin).with_name("pretrained_saes.yaml").read_text())
    found = {}
    for name, entry in known.items():
        is_plain = set(entry.get("config_overrides") or {}) <= HARMLESS
        if entry.get("conversion_func") not in READ or not is_plain:
            continue
        saes = {one["id"]: str(one["path"]) for one in entry["saes"] if is_read(entry, one)}
        if saes:
            found[name] = {"repo": entry["repo_id"], "model": entry["model"], "saes": saes}
    for layer in range(OPENSAE_LAYERS):
        found[f"opensae-llama-3.1-layer_{layer:02d}"] = {
            "repo": f"THU-KEG/OpenSAE-LLaMA-3.1-Layer_{layer:02d}",
            "model": "meta-llama/Llama-3.1-8B",
            "saes": {f"layers.{layer}.resid_post": ""},
        }
    return found


def is_read(entry: dict[str, Any], one: dict[str, Any]) -> bool:
    """Whether a dictionary's files are read as they are; Llama Scope's factor is in its files too."""
    is_scaled = one.get("norm_scaling_factor") is not None and entry.get("conversion_func") != "llama_scope"
    return not str(one["path"]).endswith(PICKLES) and not is_scaled


def packed(found: dict[str, dict[str, Any]]) -> bytes:
    """The table as a file, the same bytes each time."""
    return gzip.compress(json.dumps(found, separators=(",", ":"), sort_keys=True).encode(), 9, mtime=0)


if __name__ == "__main__":
    TABLE.write_bytes(packed(releases()))
