"""SAEs at any modules of any model, by forward hooks: nothing of the model is renamed, wrapped or changed.

    with attach(model, {"layers.2.resid_post": sae, "re:.*fc2": SAEConfig(k=32, expansion=8)}) as saes:
        model(**inputs)
        saes.latents("layers.2.resid_post")    # what fired in that forward, [B, T, k]

The places are those of ``shared.lm.targets``. Outside the context the model is what it was, bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from shared.basics.errors import GranaryError
from shared.intervene.edits import Edit, apply_edits, check_edits, reached
from shared.intervene.folder import Layout, read_attached, write_attached
from shared.intervene.placing import takes_tokens
from shared.intervene.saved import Saved
from shared.intervene.tokens import of_activation, real_tokens
from shared.intervene.where import forward_tokens, where_masks
from shared.lm.calls import Masked, call
from shared.lm.hooks import hook_at
from shared.lm.modulepoint import ModulePoint, Point
from shared.lm.places import Location, device_of, locate, without_wrappers
from shared.lm.recomputation import remembering
from shared.lm.splicing import splice
from shared.lm.targets import resolve
from shared.lm.uncompiled import uncompiled
from shared.lm.vision.shown import Shown
from shared.sae.config import SAEConfig
from shared.sae.latents import SparseLatents
from shared.sae.variants import SAE, Dictionary

Mode = Literal["observe", "replace"]
Edits = Mapping[str, Sequence[Edit]]


def attach(
    model: nn.Module,
    targets: Mapping[str, Dictionary | SAEConfig] | str | Path,
    *,
    mode: Mode = "observe",
    keep_error: bool = False,
    edits: Edits | None = None,
    pictures: Shown | None = None,
) -> "Attached":
    """Attach SAEs to places of `model`; see ``Attached``. They stay until ``detach()`` or the end of a ``with``.

    `targets`: place to SAE, or to the SAEConfig of one that ``granary.fit`` is to train; of a pattern ``re:...`` every
    place gets one of its own. Or a folder that ``save_pretrained`` wrote, or one of trained SAEs, each attached to the
    place that it records; the SAEs go to the model's device.

    `mode`: ``observe`` leaves all outputs as they are; with ``replace`` the model goes on from the reconstruction, or
    with `keep_error` from what is there plus what `edits` (place to changes of its latents) add. The SAEs act on every
    position, in a language model not on padding, BOS and EOS. `pictures`: what the images of the prompts show, for
    edits of their regions; the attribute ``pictures`` may be set anew between forwards.

    Raises GranaryError for a place that is not there, listing near names, and for what can't be attached.
    """
    inner = without_wrappers(model)
    if isinstance(targets, str | Path):
        device = device_of(inner)
        saved = read_attached(targets, device)
        wanted: Mapping[str, Dictionary | SAEConfig] = {name: one.sae for name, one in saved.items()}
    else:
        saved, wanted = {}, targets
    if not wanted:
        raise GranaryError("nothing to attach: give places of the model, each with an SAE or an SAEConfig")
    places: dict[str, Point] = {}
    taken: list[Location] = []
    given: dict[str, SAE | SAEConfig] = {}
    for target, what in wanted.items():
        _check_kind(target, what)
        for point in resolve(inner, target):
            name, location = str(point), locate(inner, point)
            if name in places or (isinstance(point, ModulePoint) and location in taken):
                raise GranaryError(f"{name} is named twice, the second time by {target}: each place gets one SAE")
            places[name], given[name] = point, what  # type: ignore[assignment]
            taken.append(location)
    return Attached(model, places, given, saved, mode=mode, keep_error=keep_error, edits=edits or {},
                    pictures=pictures)  # fmt: skip


class Attached(Mapping[str, SAE]):
    """The SAEs at the places of a model, by the places' names; a context manager that detaches them.

    Only forwards of the whole model that was given are seen, not calls of its parts.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Mapping[str, Point],
        given: Mapping[str, SAE | SAEConfig],
        saved: Mapping[str, Saved],
        *,
        mode: Mode,
        keep_error: bool,
        edits: Edits,
        pictures: Shown | None = None,
    ) -> None:
        """Places the hooks; made by ``attach``. Raises GranaryError where settings contradict one another."""
        self.model, self.inner, self.places, self.mode = model, without_wrappers(model), dict(places), mode
        self.saved: dict[str, Saved] = dict(saved)
        """What is known of each SAE's training, where something is."""
        self._given: dict[str, SAE | SAEConfig] = dict(given)
        self.pictures, self._edits = pictures, edits
        self._masks: dict[str, list[Tensor | None]] = {}
        """Of the forward: where each edit acts."""
        self._check(keep_error=keep_error, edits=edits)
        self._seen: dict[str, list[Tensor]] = {}
        self._real: Tensor | None = None
        """Which positions of the forward count; None: all."""
        self._given_mask: Tensor | None = None
        """The same for the forward that `call` runs, where its batch says so."""
        self._is_given = False
        """Whether the last forward was of such a batch."""
        self._is_inside = False
        self._awaited: frozenset[str] = frozenset()
        """The places behind which the forward ends; none: it runs to its end."""
        with ExitStack() as stack:
            stack.enter_context(uncompiled(self.inner))
            for name, point in self.places.items():
                stack.callback(hook_at(locate(self.inner, point), partial(self._see, name)).remove)
                if mode == "replace":
                    put = partial(self._replaced, name, edits=list(edits.get(name, ())), keep_error=keep_error)
                    stack.enter_context(splice(self.inner, point, put))
            stack.enter_context(remembering(self.inner, self, "_real"))
            stack.enter_context(remembering(self.inner, self, "_masks"))
            begin = self.inner.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
            stack.callback(begin.remove)
            stack.callback(self.inner.register_forward_hook(self._end, always_call=True).remove)
            self._stack: ExitStack | None = stack.pop_all()

    # ---- the SAEs --------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> SAE:
        """The SAE at a place. Raises GranaryError for one that is not trained yet, KeyError for another name."""
        found = self._given[name]
        if isinstance(found, SAEConfig):
            raise GranaryError(f"the SAE at {name} is not there yet: granary.fit(saes, batches, tokens=...) trains it")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def __repr__(self) -> str:
        return f"Attached({type(self.inner).__name__}, {self.mode}, {', '.join(self)})"

    @property
    def untrained(self) -> dict[str, SAEConfig]:
        """The configs of the SAEs that are not there yet."""
        return {name: config for name, config in self._given.items() if isinstance(config, SAEConfig)}

    def put(self, name: str, saved: Saved) -> None:
        """Put a trained SAE at a place."""
        self._given[name], self.saved[name] = saved.sae, saved

    def save_pretrained(self, folder: str | Path, *, layout: Layout = "granary") -> None:
        """Write a folder with one dictionary folder for each SAE, or in PEFT's `layout`, and nothing of the model.

        Raises GranaryError for a folder that holds files, and where an SAE is not trained yet.
        """
        write_attached(Path(folder), {name: self.saved.get(name, Saved(self[name])) for name in self}, layout)

    # ---- what a forward gave ---------------------------------------------------------------------------------------

    def call(self, batch: Any) -> None:
        """Run the model on a batch: named arguments, a tuple of arguments or the only one, or a ``Masked`` one."""
        self._given_mask = batch.mask if isinstance(batch, Masked) else None
        try:
            call(self.model, batch)
        finally:
            self._given_mask = None

    def activations(self, name: str) -> list[Tensor]:
        """Those of the model's last forward, [..., features], one tensor for each time that the module ran.

        Raises GranaryError where it did not run.
        """
        if name not in self.places:
            raise KeyError(name)
        if not self._seen.get(name):
            raise GranaryError(f"{name} did not run in the last forward of {type(self.inner).__name__}, or none was")
        return self._seen[name]

    def rows(self, name: str) -> Tensor:
        """The same as rows [N, features], of every time that it ran; of a language model without the tokens that
        SAEs are not trained on."""
        return torch.cat([self._rows(activation) for activation in self.activations(name)])

    def latents(self, name: str) -> SparseLatents:
        """Latents of the last forward, [..., k], before any edit. Raises GranaryError where the module ran twice."""
        found = self.activations(name)
        if len(found) > 1:
            raise GranaryError(
                f"{name} ran {len(found)} times: saes[{name!r}].encode(one) of saes.activations({name!r})"
            )
        return self[name].encode(found[0].to(self[name].b_dec.device))

    def run_as_far(self, names: Iterable[str], forward: Callable[[], object]) -> bool:
        """Call `forward`, which ends as soon as all the places of `names` have run; whether it ended so.

        What it would have given is lost. For models of ``shared.lm.early_end`` alone.
        """
        self._awaited = frozenset(names)
        try:
            forward()
        except _ReachedError:
            return True
        finally:
            self._awaited = frozenset()
        return False

    # ---- closing ---------------------------------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are in place."""
        return self._stack is not None

    def detach(self) -> None:
        """Take the hooks away; the SAEs stay at hand. What was seen is forgotten."""
        stack, self._stack = self._stack, None
        self._seen, self._real = {}, None
        if stack is not None:
            stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen, self._is_inside = {}, True
        given = self._given_mask
        self._real = real_tokens(self.inner, args, kwargs) if given is None else given
        self._is_given = given is not None
        self._masks = {}
        for name, edits in self._edits.items():
            wheres = [edit.where for edit in edits]
            if any(where is not None for where in wheres) and takes_tokens(self.inner):
                tokens = forward_tokens(self.inner, args, kwargs)
                self._masks[name] = where_masks(self.inner, wheres, tokens, self.pictures)

    def _end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._is_inside = False

    def _see(self, name: str, activation: Tensor) -> None:
        if self._is_inside:  # else gradient checkpointing runs the layer again, or it is called by itself
            self._seen.setdefault(name, []).append(activation.detach())
            if self._awaited and self._awaited <= self._seen.keys():
                raise _ReachedError

    def _replaced(self, name: str, activation: Tensor, *, edits: Sequence[Edit], keep_error: bool) -> Tensor:
        """What the model goes on from."""
        sae = self[name]
        x = activation.detach().to(sae.b_dec.device)
        before = sae.encode(x)
        masks = [None if one is None else self._of_tokens(one, activation) for one in self._masks.get(name, ())]
        made = sae.decode(apply_edits(before, edits, masks or None) if edits else before)
        if keep_error:
            made = made - sae.decode(before)
        made = made.to(activation.device)
        made = (activation + made if keep_error else made).to(activation.dtype)
        where, reach = self._acting(activation), reached(masks)
        if keep_error and reach is not None:  # elsewhere not even rounding changes
            where = reach if where is None else where & reach
        return made if where is None else torch.where(where[..., None], made, activation)

    def _rows(self, activation: Tensor) -> Tensor:
        where = self._acting(activation)
        return activation.flatten(0, -2) if where is None else activation[where]

    def _acting(self, activation: Tensor) -> Tensor | None:
        """bool, of the shape of `activation` without its last axis; None: all."""
        if self._real is None:
            return None
        found = of_activation(self._real, activation)
        if found is None and self._is_given:
            shape, given = list(activation.shape[:-1]), list(self._real.shape)
            raise GranaryError(f"a batch's mask is {given}, and there are {shape} activations: one for each is needed")
        return found

    @staticmethod
    def _of_tokens(mask_BT: Tensor, activation: Tensor) -> Tensor:
        found = of_activation(mask_BT, activation)
        if found is None:
            raise GranaryError(
                f"an edit's where is about tokens, and activations {list(activation.shape)} are not of the tokens of"
                " the forward: leave it out"
            )
        return found

    def _check(self, *, keep_error: bool, edits: Edits) -> None:
        if self.mode not in ("observe", "replace"):
            raise GranaryError(f"mode={self.mode!r}: choose observe or replace")
        if self.mode == "observe" and (keep_error or edits):
            raise GranaryError('keep_error and edits change what the model goes on from: give mode="replace"')
        for name in edits:
            if name not in self.places:
                raise GranaryError(f"edits name {name}, which is not attached: {', '.join(self.places)} are")
            check_edits(list(edits[name]), self[name].config.d_latent)
            if any(edit.where is not None for edit in edits[name]) and not takes_tokens(self.inner):
                raise GranaryError(f"an edit's where is about tokens, and {type(self.inner).__name__} takes none")
        if self.mode == "replace":
            for name in self.untrained:
                self[name]  # says that it is not there yet


class _ReachedError(Exception):
    """Ends a forward of which nothing more is wanted."""


def _check_kind(target: str, what: object) -> None:
    """Raise GranaryError for what is no SAE of one place."""
    if isinstance(what, SAEConfig | SAE):
        return
    instead = ": SplicedModel takes every kind, and granary train trains it" if isinstance(what, Dictionary) else ""
    kind = what.config.kind if isinstance(what, Dictionary) else type(what).__name__
    raise GranaryError(f"{target}: an SAE or an SAEConfig is attached, not a {kind}{instead}")
