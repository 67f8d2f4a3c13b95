"""A dictionary inside a language model: read its latents, change them, and let the model go on from the result.

    with SplicedModel(model, sae, "layers.16.resid_post", edits=[Edit([1234], "set", 8.0)]) as spliced:
        tokens = spliced.generate(**inputs, max_new_tokens=40)
        before = spliced.features.before       # latents of every processed token, as encoded
        after = spliced.features.after         # and after the edits

Outside the context the model is what it was, bit for bit: nothing of it is replaced, only hooks are added and removed.

A dictionary of any kind reads and writes at the sites that it records. Legend: B rows of a batch, T positions of one
forward, K slots.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from inspect import signature
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.basics.errors import GranaryError
from shared.intervene.edits import Edit, apply_edits, apply_edits_by_eviction, check_edits
from shared.intervene.padding import padding_of
from shared.intervene.record import Features, Part, Record, widen
from shared.lm import splice_through
from shared.lm.hookpoint import HookPoint
from shared.lm.places import trunk, without_wrappers
from shared.lm.recomputation import remembering
from shared.sae.sites import Sites
from shared.sae.variants.base import Dictionary

# Padding masks [B, T] of the prompts of the models that generate now, and the SAEs that are spliced into each.
_PROMPTS: WeakKeyDictionary[PreTrainedModel, Tensor] = WeakKeyDictionary()
_SPLICED: WeakKeyDictionary[PreTrainedModel, "list[SplicedModel]"] = WeakKeyDictionary()


@dataclass(frozen=True)
class TokenPlaces:
    """Where the tokens of one forward are."""

    position_BT: Tensor
    """int64: position in the row, padding not counted."""
    is_padding_BT: Tensor
    is_bos_BT: Tensor
    prompt_B: Tensor
    """int64 [B]: length of each row's prompt, padding not counted."""


class SplicedModel:
    """A transformers model with a dictionary at its sites; a context manager around any number of calls.

    The model may be wrapped by peft.

    What an edited token has at a written site, y, becomes ``y + (decode(f') - decode(f))``, f' being the edited
    latents; without edits that is y, bit for bit. With ``keep_error=False`` it becomes ``decode(f')`` alone. Of a CLT,
    each layer's latents are encoded from what the layers before it have made of the stream.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sae: Dictionary,
        hook: HookPoint | str | None = None,
        *,
        edits: Sequence[Edit] = (),
        keep_error: bool = True,
        prompt_only: bool = False,
        positions: Sequence[int] | None = None,
        include_bos: bool = False,
        opensae_compat: bool = False,
    ) -> None:
        """`hook`: where an SAE reads and writes; None: the sites that the dictionary records.

        `positions`: act on these alone, counted from each row's first token, negative ones from the prompt's end.
        `prompt_only`: leave generated tokens alone. `include_bos`: act on BOS too, which SAEs are not trained on.
        `opensae_compat`: as OpenSAE's TransformerWithSae: no error term, BOS and padding included, edits by eviction.

        Raises GranaryError for an SAE of another width or device, an unknown hook or latent, and settings that
        contradict one another.
        """
        if sae.config.unit == "sequence":
            raise GranaryError(
                f"a {sae.config.kind} reads whole contexts, of which a model that generates has the last token alone: "
                "granary eval splices it into whole ones"
            )
        self.model, self.sae = model, sae
        self.inner = check_model(model)
        self.sites = sites_of(sae, hook)
        self.edits = list(edits)
        self.keep_error = keep_error and not opensae_compat
        self.prompt_only = prompt_only
        self.positions = None if positions is None else torch.tensor(list(positions), dtype=torch.int64)
        self.include_bos = include_bos or opensae_compat
        self.opensae_compat = opensae_compat
        check_edits(self.edits, sae.config.d_latent)
        width = self.inner.config.get_text_config().hidden_size
        for verb, widths in (("reads", sae.widths.reads), ("writes", sae.widths.writes)):
            for own in widths:
                if own != width:
                    raise GranaryError(f"the SAE {verb} activations of width {own}, the model has {width}")
        if sae.b_dec.device.type != self.inner.device.type:
            raise GranaryError(
                f"the SAE is on {sae.b_dec.device}, the model on {self.inner.device}: move one with .to()"
            )
        self._stack: ExitStack | None = None
        self._place: TokenPlaces | None = None
        self._is_inside = False
        """Whether a forward of the trunk is under way."""
        self._record = Record()

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise GranaryError("this SplicedModel is in use already: make a second one for a second splice")
        with ExitStack() as stack:
            reads, writes = (list(map(HookPoint.parse, names)) for names in (self.sites.reads, self.sites.writes))
            widths, in_order = self.sae.widths, self.sae.config.follows_depth
            stack.enter_context(
                splice_through(
                    self.inner, reads, writes, self._edit, where=self._acting, widths=widths.writes,
                    read_widths=widths.reads if in_order else None, adds=self.keep_error,
                )
            )  # fmt: skip
            stack.enter_context(remembering(self.inner, self, "_place"))
            body = trunk(self.inner)
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
        self._stack = self._place = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, spliced; all of its tokens count as prompt unless they continue a cache."""
        if self._stack is None:
            if torch.is_grad_enabled() and self.inner.training and self.inner.is_gradient_checkpointing:
                raise GranaryError(
                    "gradient checkpointing runs layers again in the backward pass, when this call's splice is gone: "
                    "put `with SplicedModel(...) as spliced:` around both"
                )
            with self:
                return self(*args, **kwargs)
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's ``generate``, spliced; batches may be padded on the left, with an attention mask that says so."""
        if self._stack is None:
            with self:
                return self.generate(input_ids, attention_mask, **kwargs)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        _PROMPTS[self.inner] = attention_mask
        try:
            made = self.model.generate(  # type: ignore[operator]
                input_ids=input_ids, attention_mask=attention_mask, **kwargs
            )
            config = kwargs.get("generation_config") or self.inner.generation_config
            has_beams = (kwargs.get("num_beams") or config.num_beams or 1) > 1
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
        """Latents since the last forward that began a sequence; raises GranaryError before the first."""
        found = self._record.features()
        if found is None:
            raise GranaryError("no features yet: run the spliced model first")
        return found

    def _locate(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward of the trunk: note where its tokens are."""
        tokens: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
        inputs: Tensor | None = tokens if tokens is not None else kwargs.get("inputs_embeds")
        if inputs is None:
            raise GranaryError("the model was called without input_ids or inputs_embeds")
        shape, device = inputs.shape[:2], inputs.device
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        prompt = _PROMPTS.get(self.inner)
        if prompt is not None:  # beams and several sequences per prompt repeat the rows
            rows = prompt.to(device).repeat_interleave(shape[0] // len(prompt), dim=0)
            mask: Any = torch.nn.functional.pad(rows, (0, max(0, past + shape[1] - rows.shape[1])), value=1)
        else:
            mask = kwargs.get("attention_mask")
        is_padding_BT = padding_of(mask, past, shape, device)
        part = Part(tokens, is_padding_BT)
        self._record.begin(part, past)
        self._is_inside = True
        bos = self.inner.config.bos_token_id
        is_bos_BT = tokens == bos if tokens is not None and bos is not None else torch.zeros_like(is_padding_BT)
        self._place = TokenPlaces(
            self._positions(part, past, kwargs.get("position_ids")),
            is_padding_BT,
            is_bos_BT,
            self._prompt_lengths(prompt, past, is_padding_BT),
        )

    def _leave(self, _module: Any, _args: Any, _output: Any) -> None:
        """After each forward of the trunk."""
        self._is_inside = False

    def _positions(self, part: Part, past: int, given: Tensor | None) -> Tensor:
        """int64 [B, T]: of each token in its row, padding not counted."""
        real_B = self._record.real_tokens()
        if real_B is not None:
            now_BT = (~part.is_padding_BT).long()
            return (real_B[:, None] - now_BT.sum(1, keepdim=True) + now_BT.cumsum(1) - 1).clamp_min(0)
        counted_T = torch.arange(past, past + part.is_padding_BT.shape[1], device=part.is_padding_BT.device)
        return (given if given is not None else counted_T).expand(part.is_padding_BT.shape)

    def _prompt_lengths(self, prompt: Tensor | None, past: int, is_padding_BT: Tensor) -> Tensor:
        """[B]: what `generate` was given; in a plain call, all tokens that are not padding."""
        if prompt is not None:
            return prompt.sum(1).to(is_padding_BT.device).repeat_interleave(len(is_padding_BT) // len(prompt))
        if past and (self.prompt_only or (self.positions is not None and bool((self.positions < 0).any()))):
            raise GranaryError("prompt_only and negative positions need spliced.generate(...), which knows the prompt")
        return (~is_padding_BT).sum(1)

    def _acts(self, place: TokenPlaces) -> Tensor:
        """bool [B, T]: the tokens that the SAE acts on."""
        if self.opensae_compat:
            acts_BT = torch.ones_like(place.is_padding_BT)
        else:
            acts_BT = ~place.is_padding_BT
            if not self.include_bos:
                acts_BT &= ~place.is_bos_BT
        if self.prompt_only:
            acts_BT &= place.position_BT < place.prompt_B[:, None]
        if self.positions is not None:
            wanted = self.positions.to(place.position_BT.device)
            wanted_BP = torch.where(wanted < 0, wanted + place.prompt_B[:, None], wanted)
            acts_BT &= (place.position_BT[:, :, None] == wanted_BP[:, None, :]).any(-1)
        return acts_BT

    def _acting(self) -> Tensor:
        """bool [B, T]: the tokens of the present forward that the dictionary acts on."""
        if self._place is None:
            raise GranaryError("the hooked layer ran outside the model's own forward: call the whole model")
        return self._acts(self._place)

    def _edit(self, x_BTD: Tensor) -> Tensor:
        """What the edits add to the written sites, or with ``keep_error=False`` what takes their place."""
        acts_BT = self._acting()
        before = self.sae.encode(x_BTD)
        edit = apply_edits_by_eviction if self.opensae_compat else apply_edits
        edited = edit(before, self.edits)
        width = edited.values.shape[-1]
        after = replace(
            edited,
            values=torch.where(acts_BT[..., None], edited.values, widen(before.values, width, 0)),
            indices=torch.where(acts_BT[..., None], edited.indices, widen(before.indices, width, -1)),
        )
        if self._is_inside:  # else gradient checkpointing runs the layer again
            self._record.fill(Features(before, after, acts_BT))
        result_BTD = self.sae.decode(edited)
        return result_BTD - self.sae.decode(before) if self.keep_error else result_BTD


def sites_of(dictionary: Dictionary, hook: HookPoint | str | None) -> Sites:
    """Where it acts. Raises GranaryError where nothing says that, and for a hook in place of several sites."""
    recorded = dictionary.sites
    if hook is None:
        if recorded is None:
            raise GranaryError("the dictionary does not record where it reads and writes: give its hook")
        return recorded
    if not dictionary.config.is_autoencoder or len(dictionary.widths.reads) > 1:
        raise GranaryError(f"hook={hook} is for dictionaries of one site, this one has {recorded}: leave it out")
    return Sites.of(str(hook if isinstance(hook, HookPoint) else HookPoint.parse(hook)))


def check_model(model: Any) -> PreTrainedModel:
    """The transformers model in `model`, which may be wrapped; raises GranaryError where there is none."""
    inner = without_wrappers(model)
    if not isinstance(inner, PreTrainedModel):
        raise GranaryError(f"{type(model).__name__} is no transformers model: give one, or peft's wrapper of one")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise GranaryError(
            "this peft model learns a prompt, which puts tokens before those that are given: positions would be "
            "others; splice into model.get_base_model(), or one with LoRA"
        )
    return inner
