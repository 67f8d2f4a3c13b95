"""What a factory makes: a module, and a function that gives its batches again and again.

    def make():
        model = Net()
        model.load_state_dict(torch.load("net.pt", weights_only=True))

        def batches(seed):
            for images, _ in loader(seed):
                yield images

        return model, batches

A batch is what the model is called with: named arguments, a tuple of arguments, the only one, or a ``granary.Masked``.
"""

import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shared.basics.errors import GranaryError, told_of
from shared.basics.versions import software_versions
from shared.lm import ModelIdentity, resolve_model
from shared.lm.calls import Masked
from shared.lm.encoders import load_encoder
from stage_harvest.config import HarvestSchema

Batches = Callable[[int], Any]
OURS = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Made:
    """A model in evaluation mode and its batches: of a function of the user's, or of a kind that is known."""

    name: str
    """``package:function``, or the model's path."""
    model: nn.Module
    batches: Batches

    @property
    def told(self) -> str:
        """The key that named it, with its value."""
        return f"model.factory={self.name}"

    @property
    def corpus(self) -> str:
        """One line on where the batches come from, for the store."""
        return f"batches of {self.name}"

    def tokens_of(self, batch: Any) -> Tensor | None:
        """The token of each row of a batch; None where rows are not of tokens."""
        return None

    def record(self) -> dict[str, Any]:
        """What the store says of the model, and of what else decides the rows, beside the batches."""
        return {"model": self.identity(), "packing": {"mode": "isolated", "long_documents": "split"}}

    def versions(self) -> dict[str, str]:
        """What was used and does not belong to the identity."""
        return software_versions("torch", "numpy")

    def iterate(self, seed: int) -> Iterator[Any]:
        """All batches from the first on. Raises GranaryError where they can't be had."""
        with telling_where(f"the batches of {self.told}"):
            iterator = iter(self.batches(seed))
        while True:
            with telling_where(f"the batches of {self.told}"):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    def identity(self) -> dict[str, Any]:
        """The record of a function's model: a name and hashes, nothing that anybody runs."""
        return {"id": self.name, "factory": self.name, "class": type(self.model).__name__, "weights_hash": self._hash()}

    def _hash(self) -> str:
        """SHA-256 of names, types, shapes and values of all parameters and buffers."""
        digest = hashlib.sha256()
        for name, tensor in chain(self.model.named_parameters(), self.model.named_buffers()):
            digest.update(name.encode() + b"\0")
            _add(digest, tensor.detach())
        return digest.hexdigest()


class Described(Protocol):
    """A corpus, whatever it is of."""

    @property
    def description(self) -> str:
        """One line on it, for the store."""


@dataclass(frozen=True)
class KnownModel(Made):
    """A model in Hugging Face form that is no decoder, and what it reads."""

    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "numpy")
    """Whose versions the store records."""
    kind: str
    """The family, as transformers calls it."""
    known: ModelIdentity
    source: Described

    @property
    def told(self) -> str:
        return f"model {self.name}"

    @property
    def corpus(self) -> str:
        return self.source.description

    def identity(self) -> dict[str, Any]:
        return {**self.known, "encoder": self.kind}

    def versions(self) -> dict[str, str]:
        folder = resolve_model(self.name, self.known["revision"])
        return {**software_versions(*self.packages), "model_path": str(folder.absolute())}


def encoder_of(cfg: HarvestSchema, device: torch.device) -> nn.Module:
    """The encoder that the configuration names, whole."""
    model: nn.Module = load_encoder(
        cfg.model.path,
        cfg.model.dtype.value,
        device=device,
        revision=cfg.model.revision,
        attn_implementation=cfg.model.attn_implementation,
    )
    return model


def made_by(name: str, device: torch.device) -> Made:
    """Call the factory `name`, ``package:function``; its module goes to `device`, without gradient.

    The working folder is looked into too, as by ``python -m``. Raises GranaryError where there is none such, where it
    fails (with the line where it did), and where it returns something else.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name.isidentifier():
        raise GranaryError(f"model.factory={name}: write package:function, for example my_models:make")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    with telling_where(f"model.factory={name}"):
        module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise GranaryError(f"model.factory={name}: {module_name} has no function {function_name}")
    with telling_where(f"model.factory={name}"):
        made = function()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1])):
        raise GranaryError(
            f"model.factory={name} gave {_described(made)}: it must return a torch module and a function of a seed that"
            " gives the module's batches"
        )
    model, batches = made
    with telling_where(f"model.factory={name} on {device}"):
        model.to(device)
    return Made(name, model.eval().requires_grad_(False), batches)


def digest_of(batch: Any) -> bytes:
    """SHA-256 of a batch: of the structure of its arguments, and the type, shape and values of each tensor.

    Raises GranaryError for an argument that could not be compared.
    """
    digest = hashlib.sha256()
    _add(digest, batch)
    return digest.digest()


@contextmanager
def telling_where(what: str) -> Iterator[None]:
    """Turns what the user's code raises into one line that names the place in it."""
    try:
        yield
    except GranaryError:
        raise
    except Exception as error:
        places = [one for one in traceback.extract_tb(error.__traceback__) if _is_theirs(one.filename)]
        where = f" ({places[-1].filename}, line {places[-1].lineno})" if places else ""
        raise GranaryError(f"{what}: {type(error).__name__}: {told_of(error)}{where}") from error


def _is_theirs(file: str) -> bool:
    """Whether a file of a traceback is the user's, not ours or a library's."""
    ours = (str(OURS / "stage_harvest"), str(OURS / "shared"))
    return not file.startswith(("<frozen", *ours)) and "site-packages" not in Path(file).parts


def _add(digest: Any, value: Any) -> None:
    """Feed a value into a hash, so that no two values feed the same."""
    match value:
        case Masked():
            digest.update(b"masked")
            _add(digest, value.inputs)
            _add(digest, value.mask)
        case Tensor():
            whole = value.detach().cpu().contiguous()
            digest.update(f"tensor {whole.dtype} {list(whole.shape)}".encode())
            digest.update(whole.reshape(-1).view(torch.uint8).numpy().data if whole.numel() else b"")
        case np.ndarray():
            _add(digest, torch.from_numpy(np.ascontiguousarray(value)))
        case Mapping():
            digest.update(f"mapping {len(value)}".encode())
            for key, one in value.items():
                digest.update(repr(key).encode() + b"\0")
                _add(digest, one)
        case tuple() | list():
            digest.update(f"row {len(value)}".encode())
            for one in value:
                _add(digest, one)
        case None | bool() | int() | float() | str():
            digest.update(f"{type(value).__name__} {value!r}\0".encode())
        case _:
            raise GranaryError(
                f"a batch holds {_described(value)}, which can't be compared with that of another run: give tensors,"
                " numbers, text, and lists or mappings of them"
            )


def _described(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {', '.join(type(one).__name__ for one in value) or 'nothing'}"
    return f"a {type(value).__name__}"
