"""A dictionary inside a model: read its latents, change them, and let the model go on from the result.

    with SplicedModel(model, sae, "layers.16.resid_post", edits=[Edit([1234], "set", 8.0)]) as spliced:
        tokens = spliced.generate(**inputs, max_new_tokens=40)
        before = spliced.features.before       # latents of every processed token, as encoded
        after = spliced.features.after         # and after the edits

Outside the context the model is what it was, bit for bit: nothing of it is replaced, only hooks are added and removed.

A dictionary of any kind reads and writes at the sites that it records, which are places of ``shared.lm.targets`` in any
module. Legend: B rows of a batch, T positions of one forward, K slots.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from inspect import signature
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from shared.basics.errors import GranaryError
from shared.intervene.edits import Edit, apply_edits, apply_edits_by_eviction, check_edits, reached
from shared.intervene.placing import Choice, Forward, takes_tokens, token_places, tokens_of
from shared.intervene.record import Features, Record, widen
from shared.intervene.tokens import of_activation
from shared.intervene.where import where_masks
from shared.intervene.whole import whole_of
from shared.lm import splice_through
from shared.lm.calls import filled_slots, images_in_the_forward, named_arguments
from shared.lm.hookpoint import HookPoint
from shared.lm.modulepoint import Point
from shared.lm.places import body_of, device_of, trunk, without_wrappers
from shared.lm.recomputation import is_checkpointed, remembering
from shared.lm.targets import resolve
from shared.lm.vision.shown import Shown
from shared.sae.latents import SparseLatents
from shared.sae.sites import Sites
from shared.sae.variants import Dictionary, Lorsa

# What a model over tokens may be given beside them.
BESIDE_TOKENS = ("pixel_values", "pixel_values_videos", "input_features")
# Padding masks [B, T] of the prompts of the models that generate now, and the SAEs that are spliced into each.
_PROMPTS: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
_SPLICED: WeakKeyDictionary[nn.Module, "list[SplicedModel]"] = WeakKeyDictionary()


class SplicedModel:
    """A model with a dictionary at its sites; a context manager around any number of calls.

    Any module is a model, wrapped by peft or not. In one of transformers over tokens the dictionary acts on tokens; in
    another, and at a place that is not of the tokens (in a vision tower), on all that is there.

    What an edited token has at a written site, y, becomes ``y + (decode(f') - decode(f))``, f' being the edited
    latents; without edits that is y, bit for bit. With ``keep_error=False`` it becomes ``decode(f')`` alone. Of a CLT,
    each layer's latents are encoded from what the layers before it have made of the stream. A Lorsa attends to the
    tokens that the model's own attention sees, those that it does not act on (BOS) included, padding aside.
    """

    def __init__(
        self,
        model: nn.Module,
        sae: Dictionary,
        hook: Point | str | None = None,
        *,
        edits: Sequence[Edit] = (),
        keep_error: bool = True,
        prompt_only: bool = False,
        positions: Sequence[int] | None = None,
        include_bos: bool = False,
        opensae_compat: bool = False,
        pictures: Shown | None = None,
    ) -> None:
        """`hook`: where an SAE reads and writes; None: the sites that the dictionary records.

        `positions`: act on these alone, counted from each row's first token, negative ones from the prompt's end.
        `prompt_only`: leave generated tokens alone. `include_bos`: act on BOS too, which SAEs are not trained on.
        `opensae_compat`: as OpenSAE's TransformerWithSae: no error term, BOS and padding included, edits by eviction.
        `pictures`: what the images of the prompts show, for edits of their regions; may be set anew between calls.

        Raises GranaryError for an SAE of another width or device, an unknown hook or latent, and settings that
        contradict one another.
        """
        self.model, self.sae = model, sae
        self.inner = check_model(model)
        self.reads, self.writes = places_of(self.inner, sae, hook)
        self.edits = list(edits)
        self.keep_error = keep_error and not opensae_compat
        self.opensae_compat = opensae_compat
        self.choice = Choice(
            None if positions is None else torch.tensor(list(positions), dtype=torch.int64),
            prompt_only,
            include_bos=include_bos or opensae_compat,
            include_padding=opensae_compat,
        )
        self.pictures = pictures
        check_edits(self.edits, sae.config.d_latent)
        self._check()
        self._stack: ExitStack | None = None
        self._forward: Forward | None = None
        self._is_inside = False
        """Whether a forward of the trunk is under way."""
        self._record = Record()
        self._latest: Features | None = None
        """Of the last time that the place ran, where it is not of tokens."""

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise GranaryError("this SplicedModel is in use already: make a second one for a second splice")
        with ExitStack() as stack:
            widths, in_order = self.sae.widths, self.sae.config.follows_depth
            stack.enter_context(
                splice_through(
                    self.inner, self.reads, self.writes, self._edit, where=self._acting, widths=widths.writes,
                    read_widths=widths.reads if in_order else None, adds=self.keep_error,
                )
            )  # fmt: skip
            stack.enter_context(remembering(self.inner, self, "_forward"))
            body = body_of(self.inner, (*self.reads, *self.writes))
            stack.callback(body.register_forward_pre_hook(self._locate, with_kwargs=True).remove)
            stack.callback(body.register_forward_hook(self._leave).remove)
            spliced = _SPLICED.setdefault(self.inner, [])
            spliced.append(self)
            stack.callback(spliced.remove, self)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stack is not None:
            self._stack.close()
        self._stack = self._forward = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, spliced; all of its tokens count as prompt unless they continue a cache."""
        if self._stack is None:
            if torch.is_grad_enabled() and self.inner.training and is_checkpointed(self.inner):
                raise GranaryError(
                    "gradient checkpointing runs layers again in the backward pass, when this call's splice is gone: "
                    "put `with SplicedModel(...) as spliced:` around both"
                )
            with self:
                return self(*args, **kwargs)
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's ``generate``, spliced; batches may be padded on the left, with an attention mask that says so.

        Raises GranaryError for a model that does not generate tokens, and for beams over more than tokens.
        """
        if not takes_tokens(self.inner):
            raise GranaryError(f"{type(self.inner).__name__} does not continue token ids: call it inside the `with`")
        config = kwargs.get("generation_config") or self.inner.generation_config
        has_beams = (kwargs.get("num_beams") or config.num_beams or 1) > 1
        if any(isinstance(one.sae, Lorsa) for one in (self, *_SPLICED.get(self.inner, []))):
            if has_beams:
                raise GranaryError("what a lorsa has read can't follow beams that change rows: leave num_beams=1")
            if filled_slots(kwargs):
                raise GranaryError("a lorsa attends to what it has read since generate began: leave the cache out")
        if has_beams and not kwargs.keys().isdisjoint(BESIDE_TOKENS):
            raise GranaryError("what beams over images have processed can't be followed: leave num_beams=1")
        if self._stack is None:
            with self:
                return self.generate(input_ids, attention_mask, **kwargs)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        _PROMPTS[self.inner] = attention_mask
        try:
            with images_in_the_forward(self.inner):
                made = self.model.generate(  # type: ignore[operator]
                    input_ids=input_ids, attention_mask=attention_mask, **kwargs
                )
            self._follow(made if isinstance(made, Tensor) else made.sequences, attention_mask, anew=has_beams)
            return made
        finally:
            del _PROMPTS[self.inner]

    def _follow(self, tokens_BL: Tensor, prompt_mask: Tensor, *, anew: bool) -> None:
        """Make what is on record that of the sequences that were returned, the last token aside.

        Candidates that were processed in vain are dropped. Where rows have gone over into one another, as those of
        beams do, the sequences are processed `anew`.
        """
        spliced, length = _SPLICED[self.inner], tokens_BL.shape[1] - 1
        for one in spliced:
            one._record.keep(length)
        if not anew and all(one._record.is_of(tokens_BL[:, :length]) for one in spliced):
            return
        new = length - prompt_mask.shape[1]
        if new < 0:  # nothing was generated, or embeddings were given
            return
        mask = prompt_mask.repeat_interleave(len(tokens_BL) // len(prompt_mask), dim=0)
        mask = torch.nn.functional.pad(mask, (0, new), value=1)
        inputs: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
        if "position_ids" in signature(self.inner.forward).parameters:  # as generate counts them
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        self.model(input_ids=tokens_BL[:, :length], **inputs)

    @property
    def features(self) -> Features:
        """Latents since the last forward that began a sequence, or where the place is not of tokens, of the last time
        that it ran; raises GranaryError before the first."""
        found = self._record.features() or self._latest
        if found is None:
            raise GranaryError("no features yet: run the spliced model first")
        return found

    def _locate(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward: note where its tokens are."""
        self._is_inside = True
        if takes_tokens(self.inner):
            named = named_arguments(module, args, kwargs)
            prompt = _PROMPTS.get(self.inner)
            tokens = token_places(self.inner, named, self._record, prompt)
            whole = None
            if isinstance(self.sae, Lorsa):
                whole = whole_of(self.inner, named, self._record, self.sae, generates=prompt is not None)
            wheres = [edit.where for edit in self.edits]
            masks = where_masks(self.inner, wheres, tokens_of(tokens, self._record), self.pictures)
            self._forward = Forward(tokens, whole, masks)
        else:
            self._forward = Forward(None)

    def _leave(self, _module: Any, _args: Any, _output: Any) -> None:
        """After each forward."""
        self._is_inside = False

    def _acting(self, activation: Tensor) -> Tensor | None:
        """bool, of the shape of `activation` without its last axis: where the dictionary acts; None: everywhere."""
        if self._forward is None:
            raise GranaryError("the hooked layer ran outside the model's own forward: call the whole model")
        tokens = self._forward.tokens
        chosen = None if tokens is None else self.choice.of(tokens)
        reach = reached(self._forward.masks)
        if chosen is not None and reach is not None and self.keep_error:  # elsewhere not even rounding changes
            chosen = chosen & reach
        acts = None if chosen is None else of_activation(chosen, activation)
        if acts is None and (self.choice.needs_tokens or any(edit.where is not None for edit in self.edits)):
            raise GranaryError(
                "prompt_only, positions and an edit's where are about tokens, and activations"
                f" {list(activation.shape)} are not of the tokens of the forward: leave them out"
            )
        return acts

    def _edit(self, x: Tensor) -> Tensor:
        """What the edits add to the written sites, or with ``keep_error=False`` what takes their place."""
        before, acts = self._encoded(x)
        if self.opensae_compat:
            edited = apply_edits_by_eviction(before, self.edits)
        else:
            masks = [] if self._forward is None else self._forward.masks
            edited = apply_edits(before, self.edits, [m if m is None else of_activation(m, x) for m in masks] or None)
        width = edited.values.shape[-1]
        after = replace(
            edited,
            values=torch.where(acts[..., None], edited.values, widen(before.values, width, 0)),
            indices=torch.where(acts[..., None], edited.indices, widen(before.indices, width, -1)),
        )
        if self._is_inside:  # else gradient checkpointing runs the layer again
            self._keep(Features(before, after, acts), x)
        result = self.sae.decode(edited)
        return result - self.sae.decode(before) if self.keep_error else result

    def _encoded(self, x: Tensor) -> tuple[SparseLatents, Tensor]:
        """Latents of what is read, and where the dictionary acts: bool, of the shape of `x` without its last axis."""
        acts = self._acting(x)
        whole = None if self._forward is None or acts is None else self._forward.whole
        if acts is None:
            acts = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        return self.sae.encode(x) if whole is None else whole.encode(x), acts

    def _keep(self, features: Features, read: Tensor) -> None:
        forward = self._forward
        if forward is not None and forward.tokens is not None and self._acting(read) is not None:
            shape = forward.tokens.is_padding_BT.shape
            read_BTD = None if forward.whole is None else read.detach().reshape(*shape, -1)
            self._record.fill(features.shaped(shape), read_BTD)
        else:
            self._latest = features

    def _check(self) -> None:
        """Raise GranaryError for widths and devices that are not the model's."""
        if all(isinstance(point, HookPoint) for point in (*self.reads, *self.writes)):  # else the forward tells
            width = trunk(self.inner).config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
            for verb, widths in (("reads", self.sae.widths.reads), ("writes", self.sae.widths.writes)):
                for own in widths:
                    if own != width:
                        raise GranaryError(f"the SAE {verb} activations of width {own}, the model has {width}")
        if any(edit.where is not None for edit in self.edits):
            if self.opensae_compat:
                raise GranaryError("opensae_compat edits every token: leave it or the edits' where out")
            if not takes_tokens(self.inner):
                raise GranaryError(f"an edit's where is about tokens, and {type(self.inner).__name__} takes none")
        device = device_of(self.inner)
        if self.sae.b_dec.device.type != device.type:
            raise GranaryError(f"the SAE is on {self.sae.b_dec.device}, the model on {device}: move one with .to()")


def places_of(model: nn.Module, dictionary: Dictionary, hook: Point | str | None) -> tuple[list[Point], list[Point]]:
    """Where it reads and where it writes.

    Raises GranaryError where nothing says that, for what the model lacks, and for a hook in place of several sites.
    """
    sites = dictionary.sites
    if hook is None and sites is None:
        raise GranaryError("the dictionary does not record where it reads and writes: give its hook")
    if hook is not None:
        if not dictionary.config.is_autoencoder or len(dictionary.widths.reads) > 1:
            raise GranaryError(f"hook={hook} is for dictionaries of one site, this one has {sites}: leave it out")
        sites = Sites.of(str(hook))
    assert sites is not None
    return [_one_place(model, name) for name in sites.reads], [_one_place(model, name) for name in sites.writes]


def _one_place(model: nn.Module, name: str) -> Point:
    found = resolve(model, name)
    if len(found) > 1:
        places = ", ".join(map(str, found))
        raise GranaryError(f"{name} names {len(found)} places, {places}: a SplicedModel has one, and may be nested")
    return found[0]


def check_model(model: nn.Module) -> nn.Module:
    """The model in `model`, which may be wrapped; raises GranaryError where peft puts tokens before those given."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise GranaryError(
            "this peft model learns a prompt, which puts tokens before those that are given: positions would be "
            "others; splice into model.get_base_model(), or one with LoRA"
        )
    return without_wrappers(model)
