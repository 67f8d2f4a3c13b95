"""A dictionary on disk: a folder with ``config.json`` and ``sae.safetensors``.

    {"format": "granary-sae", "version": 2, "kind": "sae",
     "sites": {"reads": [...], "writes": [...], "unit": "token"} or null, "widths": {"reads": [...], "writes": [...]},
     "d_latent": ..., "activation": {"name": ..., "k": ...}, "normalisation": {"name": ..., "shift_back": ...},
     "pre_bias": ..., "unit_norm_decoder": ..., "options": {what only this kind has},
     "training": {a record of how it was learnt}, "provenance": {where it comes from},
     "sha256": {digest of each tensor}}

All before ``training`` is what encoding and decoding need. Version 1, of SAEs alone, held one flat ``config`` for both.
The safetensors file carries the same JSON in its metadata, so that a save which died between the two files is noticed
when loading.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shared.basics.documents import parse_json
from shared.basics.errors import GranaryError
from shared.basics.files import replacing
from shared.basics.run_folder import CONFIG_FILE, WEIGHTS_FILE, RunFolder
from shared.launch import commands
from shared.sae import releases
from shared.sae.config import DictionaryConfig
from shared.sae.sites import Sites, SiteWidths
from shared.sae.weights_file import Digests, digests_in, write_weights

FORMAT = "granary-sae"
VERSION = 2
# Weights up to this size are compared with their digests in less than a second.
QUICK_BYTES = 1 << 29
# What an SAE at the top of a hub repository may consist of, in this format or another that shared.sae.formats reads.
HUB_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    "cfg.json",
    "sae_weights.safetensors",
    "activation_scaler.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "ae.pt",
    "hyperparams.json",
    "checkpoints/final.safetensors",
    "final.pt",
    "params.npz",
    "params.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "sae.pt",
    "n_images_*.pt",
)
# The keys of version 1's flat config, in its order.
FLAT_KEYS = (
    "d_model", "d_latent", "k", "activation", "prefixes", "normalisation", "shift_back", "pre_bias",
    "unit_norm_decoder", "loss", "auxk_alpha", "auxk_k", "multi_topk_weight", "multi_topk_factor", "penalty",
    "penalty_weight", "tanh_scale", "frequency_scale", "bandwidth", "threshold_init", "preact_weight",
    "threshold_decay", "dead_after_tokens", "bias_init", "encoder_init", "init_subspace",
)  # fmt: skip

Weights = tuple[DictionaryConfig, dict[str, torch.Tensor]]
FOREIGN_READERS: list[Callable[[Path], Weights | None]] = []
"""Readers of other projects' folders; None for a folder that is not theirs. ``shared.sae.loading`` adds its own."""


@dataclass(frozen=True)
class Description:
    """What ``config.json`` says of a dictionary."""

    kind: str
    widths: SiteWidths
    sites: Sites | None
    own_fields: dict[str, Any]
    """Fields of its config beside widths and sites."""
    training: dict[str, Any]
    """How it was learnt, as ``shared.sae.learn.config.LearningConfig`` records it; empty where that is not known."""
    provenance: dict[str, Any]
    text: str
    """The JSON itself."""
    digests: Digests | None = None
    """Of each tensor; None in folders from before there were any."""

    def config(self, kinds: Sequence[type[DictionaryConfig]]) -> DictionaryConfig:
        """The config, of one of `kinds`; raises GranaryError for another kind, and for fields that make no sense."""
        return _check_kind(self.kind, kinds).of(self.widths, self.own_fields, self.sites)

    def flat(self) -> dict[str, Any]:
        """Config and training record in one dictionary, in version 1's order where version 1 knew the key."""
        width = {"d_model": self.widths.reads[0]} if self.kind == "sae" else asdict(self.widths)
        found = {**width, **self.own_fields, **self.training}
        return {name: found[name] for name in sorted(found, key=_flat_place)}


def _check_kind(name: str, kinds: Sequence[type[DictionaryConfig]]) -> type[DictionaryConfig]:
    """The one of `kinds` of this name; raises GranaryError where there is none."""
    for kind in kinds:
        if kind.kind == name:
            return kind
    raise GranaryError(f"it is a {name}, not a {' or '.join(kind.kind for kind in kinds)}: use granary.load")


def _flat_place(name: str) -> tuple[int, str]:
    return (FLAT_KEYS.index(name), "") if name in FLAT_KEYS else (len(FLAT_KEYS), name)


def save(
    folder: Path,
    config: DictionaryConfig,
    tensors: Mapping[str, torch.Tensor],
    training: Mapping[str, Any],
    provenance: Mapping[str, Any],
    *,
    fetch: Callable[[str], torch.Tensor | Iterable[torch.Tensor]] | None = None,
) -> None:
    """Write both files; each appears whole or not at all, and a mixture of two saves does not load.

    With `fetch` the tensors give names, shapes and types alone, and it gives each one's values when it is its turn, at
    once or in blocks of rows.
    """
    document = to_document(config, training, provenance)

    def text(digests: Digests) -> str:
        return json.dumps({**document, "sha256": digests}, indent=2, sort_keys=True)

    files = RunFolder(folder)
    with replacing(files.config) as config_file, replacing(files.weights) as weights_file:  # the weights go first
        digests = write_weights(
            weights_file, tensors, fetch or tensors.__getitem__, lambda digests: {"granary": text(digests)}
        )
        config_file.write(f"{text(digests)}\n".encode())


def to_document(config: DictionaryConfig, training: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` holds."""
    common = {field.name for field in fields(DictionaryConfig)}
    own = config.own_fields()
    sites = config.sites or Sites.from_provenance(provenance)
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": config.kind,
        "sites": None if sites is None else asdict(sites),
        "widths": asdict(config.widths),
        "d_latent": own["d_latent"],
        "activation": {"name": own["activation"], "k": own["k"]},
        "normalisation": {"name": own["normalisation"], "shift_back": own["shift_back"]},
        "pre_bias": own["pre_bias"],
        "unit_norm_decoder": own["unit_norm_decoder"],
        "options": {name: value for name, value in own.items() if name not in common},
        "training": dict(training),
        "provenance": dict(provenance),
    }


def describe(folder: Path) -> Description:
    """What the folder holds, from its ``config.json``; raises GranaryError when that is missing, torn or foreign."""
    path = folder / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except FileNotFoundError:
        raise GranaryError(f"{folder} has no {CONFIG_FILE}: point at a folder that a training run exported") from None
    except ValueError as error:
        raise GranaryError(f"{path} is not JSON: {error}") from None
    document = parse_json(text, path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise GranaryError(f"{path} does not describe an SAE of this project (format {FORMAT!r})")
    version = document.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise GranaryError(f"{path} has format version {version}, this program reads up to {VERSION}")
    try:
        return _from_version_1(document, text) if version == 1 else _from_version_2(document, text)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise GranaryError(f"{path} is incomplete or of a wrong type: {error!r}") from None


def from_document(document: Mapping[str, Any], provenance: Mapping[str, Any]) -> Description:
    """Read what ``to_document`` gave, or version 1's flat config, with another provenance."""
    if "format" in document:
        return _from_version_2({**document, "provenance": provenance}, "")
    return _from_version_1({"config": document, "provenance": provenance}, "")


def _from_version_2(document: dict[str, Any], text: str) -> Description:
    sites = document["sites"]
    return Description(
        kind=str(document["kind"]),
        widths=SiteWidths(_numbers(document["widths"]["reads"]), _numbers(document["widths"]["writes"])),
        sites=None if sites is None else _sites(sites["reads"], sites["writes"], sites["unit"]),
        own_fields={
            "d_latent": document["d_latent"],
            "k": document["activation"]["k"],
            "activation": document["activation"]["name"],
            "normalisation": document["normalisation"]["name"],
            "shift_back": document["normalisation"]["shift_back"],
            "pre_bias": document["pre_bias"],
            "unit_norm_decoder": document["unit_norm_decoder"],
            **document["options"],
        },
        training=dict(document["training"]),
        provenance=dict(document["provenance"]),
        text=text,
        digests=dict(document["sha256"]) if "sha256" in document else None,
    )


def _from_version_1(document: dict[str, Any], text: str) -> Description:
    flat, provenance = dict(document["config"]), dict(document.get("provenance", {}))
    unknown = sorted(set(flat) - set(FLAT_KEYS))
    if unknown:
        raise GranaryError(f"the SAE config has unknown keys {', '.join(unknown)}: is it from a newer version?")
    width = flat.pop("d_model")
    artefact = {field.name for field in fields(DictionaryConfig)}
    return Description(
        kind="sae",
        widths=SiteWidths((width,), (width,)),
        sites=Sites.from_provenance(provenance),
        own_fields={name: value for name, value in flat.items() if name in artefact},
        training={name: value for name, value in flat.items() if name not in artefact},
        provenance=provenance,
        text=text,
    )


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise TypeError(f"{values!r} is no list of whole numbers")
    return tuple(values)


def _sites(reads: Any, writes: Any, unit: Any) -> Sites:
    for names in (reads, writes):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{names!r} is no list of names")
    return Sites(tuple(reads), tuple(writes), unit)


def read_weights(
    folder: Path,
    kinds: Sequence[type[DictionaryConfig]],
    device: str | torch.device = "cpu",
    *,
    verify: bool | None = None,
) -> Weights:
    """Config, of one of `kinds`, and tensors of a folder of this project's format or a foreign one.

    `verify`: compare every tensor with its digest; None: where that takes less than a second. Raises GranaryError when
    a file is missing, torn, damaged or foreign, or the dictionary is of another kind.
    """
    if not is_own(folder):
        for read in FOREIGN_READERS:
            foreign = read(folder)
            if foreign is not None:
                config, tensors = foreign
                _check_kind(config.kind, kinds)
                return config, {name: tensor.to(device) for name, tensor in tensors.items()}
    found = describe(folder)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise GranaryError(f"{folder} has no {WEIGHTS_FILE}: point at a folder that a training run exported")
    try:
        config = found.config(kinds)
        with safe_open(weights, framework="pt", device=str(device)) as file:
            if (file.metadata() or {}).get("granary") != found.text:
                raise GranaryError(f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} are of different saves; export again")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise GranaryError(f"{weights} is damaged ({error}); export the SAE again") from None
    if found.digests is not None and (weights.stat().st_size <= QUICK_BYTES if verify is None else verify):
        check_digests(weights, found.digests)
    return config, tensors


def check_digests(weights: Path, digests: Digests) -> None:
    """Raise GranaryError for a tensor of the file that is not what was saved; it is read in pieces, not mapped."""
    with weights.open("rb") as file:
        for name, digest in digests_in(file):
            if digest != digests.get(name):
                raise GranaryError(f"{weights} is damaged in {name}; export the SAE again")


def load_provenance(folder: str | Path) -> dict[str, Any]:
    """What ``save`` was told about where the dictionary comes from."""
    return describe(Path(folder)).provenance


def is_own(folder: Path) -> bool:
    """Whether the folder has the files of this project's format."""
    return RunFolder(folder).has_dictionary


def locate(path_or_hub_id: str | Path) -> Path:
    """A local folder as it is; owner/name, hf://owner/name/folder and release:id are downloaded from the hub.

    Raises GranaryError where there is none.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if path.is_file():
        command = commands.line("convert", name, "NEW", "--to", "granary", "--as", "FORMAT")
        raise GranaryError(f"{name} is a file, not the folder of an SAE: {command} reads one")
    if releases.is_named(name):
        name = releases.place_of(name)
    owner, _, rest = name.removeprefix("hf://").partition("/")
    repository, _, inside = rest.partition("/")
    is_path = path.is_absolute() or name.startswith((".", "~")) or (inside and not name.startswith("hf://"))
    if is_path or not (owner and repository):
        raise GranaryError(f"there is no SAE folder {name}: train one, or give a hub id owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [f"{inside.strip('/')}/*"] if inside else [*HUB_FILES]
    try:
        folder = Path(snapshot_download(f"{owner}/{repository}", allow_patterns=wanted)) / inside
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GranaryError(f"{name} is neither a folder nor a hub repository that can be reached: {reason}") from None
    if not folder.is_dir():
        raise GranaryError(f"the hub repository {owner}/{repository} has no folder {inside}")
    return folder
