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
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.basics.errors import GranaryError
from shared.intervene.edits import Edit, apply_edits, apply_edits_by_eviction, check_edits
from shared.lm import splice_through
from shared.lm.hookpoint import HookPoint
from shared.sae.latents import SparseLatents
from shared.sae.sites import Sites
from shared.sae.variants.base import Dictionary

# Prompt lengths [B] of the models that generate now, for all of the SAEs that are spliced into them.
_PROMPTS: WeakKeyDictionary[PreTrainedModel, Tensor] = WeakKeyDictionary()


@dataclass(frozen=True)
class Features:
    """Latents of every token of the last sequence that the model processed, [B, T, K] in order of position.

    After ``generate`` that is the prompt, then one row per generated token but the last, which is never fed back.
    """

    before: SparseLatents
    """As encoded."""
    after: SparseLatents
    """After the edits; equal to `before` where none applied."""
    applied: Tensor
    """bool [B, T]: where the SAE acted. Elsewhere the model's activation was left alone."""


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
        self.model, self.sae = model, sae
        self.sites = sites_of(sae, hook)
        self.edits = list(edits)
        self.keep_error = keep_error and not opensae_compat
        self.prompt_only = prompt_only
        self.positions = None if positions is None else torch.tensor(list(positions), dtype=torch.int64)
        self.include_bos = include_bos or opensae_compat
        self.opensae_compat = opensae_compat
        check_edits(self.edits, sae.config.d_latent)
        width = model.config.get_text_config().hidden_size
        for verb, widths in (("reads", sae.widths.reads), ("writes", sae.widths.writes)):
            for own in widths:
                if own != width:
                    raise GranaryError(f"the SAE {verb} activations of width {own}, the model has {width}")
        if sae.b_dec.device.type != model.device.type:
            raise GranaryError(f"the SAE is on {sae.b_dec.device}, the model on {model.device}: move one with .to()")
        self._stack: ExitStack | None = None
        self._place: TokenPlaces | None = None
        self._recorded: list[Features] = []
        self._begins = True
        """Whether nothing of the present forward has been recorded."""

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise GranaryError("this SplicedModel is in use already: make a second one for a second splice")
        with ExitStack() as stack:
            reads, writes = (list(map(HookPoint.parse, names)) for names in (self.sites.reads, self.sites.writes))
            widths, in_order = self.sae.widths, self.sae.config.follows_depth
            stack.enter_context(
                splice_through(
                    self.model, reads, writes, self._edit, where=self._acting, widths=widths.writes,
                    read_widths=widths.reads if in_order else None, adds=self.keep_error,
                )
            )  # fmt: skip
            stack.callback(self.model.base_model.register_forward_pre_hook(self._locate, with_kwargs=True).remove)
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
        _PROMPTS[self.model] = attention_mask.sum(1)
        try:
            return self.model.generate(input_ids, attention_mask=attention_mask, **kwargs)  # type: ignore[operator]
        finally:
            del _PROMPTS[self.model]

    @property
    def features(self) -> Features:
        """Latents since the last forward that began a sequence; raises GranaryError before the first."""
        if not self._recorded:
            raise GranaryError("no features yet: run the spliced model first")
        parts = self._recorded
        return Features(
            before=join([part.before for part in parts]),
            after=join([part.after for part in parts]),
            applied=torch.cat([part.applied for part in parts], dim=1),
        )

    def _locate(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward of the trunk: note where its tokens are."""
        tokens: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
        inputs: Tensor | None = tokens if tokens is not None else kwargs.get("inputs_embeds")
        if inputs is None:
            raise GranaryError("the model was called without input_ids or inputs_embeds")
        shape, device, length = inputs.shape[:2], inputs.device, inputs.shape[1]
        cache = kwargs.get("past_key_values")
        self._begins = True
        past = int(cache.get_seq_length()) if cache is not None else 0
        if past == 0:
            self._recorded.clear()  # a new sequence
        mask: Tensor | None = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            seen = mask[:, : past + length].long()
            position_BT = (seen.cumsum(1) - 1)[:, -length:].clamp_min(0)
            is_padding_BT = seen[:, -length:] == 0
        else:
            given = kwargs.get("position_ids")
            counted = torch.arange(past, past + length, device=device)
            position_BT = (given if given is not None else counted).expand(shape)
            is_padding_BT = torch.zeros(shape, dtype=torch.bool, device=device)
        bos = self.model.config.bos_token_id
        is_bos_BT = tokens == bos if tokens is not None and bos is not None else torch.zeros_like(is_padding_BT)
        self._place = TokenPlaces(
            position_BT, is_padding_BT, is_bos_BT, self._prompt_lengths(shape, past, is_padding_BT)
        )

    def _prompt_lengths(self, shape: torch.Size, past: int, is_padding_BT: Tensor) -> Tensor:
        """[B]: what `generate` was given; in a plain call, all tokens that are not padding."""
        prompt_B = _PROMPTS.get(self.model)
        if prompt_B is not None:  # beams and several sequences per prompt repeat the rows
            return prompt_B.to(is_padding_BT.device).repeat_interleave(shape[0] // len(prompt_B))
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
        if not self._begins:  # a further site of one forward, with more of what is read
            self._recorded.pop()
        self._begins = False
        self._recorded.append(Features(before, after, acts_BT))
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


def widen(values: Tensor, width: int, fill: int) -> Tensor:
    """Append slots up to `width`."""
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]), value=fill)


def join(parts: Sequence[SparseLatents]) -> SparseLatents:
    """Latents of consecutive positions as one, [B, sum of T, largest K]."""
    width = max(part.values.shape[-1] for part in parts)

    def cat(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors, dim=1)

    return SparseLatents(
        torch.cat([widen(part.values, width, 0) for part in parts], dim=1),
        torch.cat([widen(part.indices, width, -1) for part in parts], dim=1),
        cat("token_mean"),
        cat("token_scale"),
        cat("skipped"),
    )
