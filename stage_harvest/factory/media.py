"""Sounds and images through a model in Hugging Face form, whose own processor makes its inputs.

The models are those that read nothing else: ViT and its kin, the vision tower of CLIP and SigLIP, Whisper's encoder,
wav2vec 2 and its kin.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor

from shared.basics.errors import GranaryError, told_of
from shared.basics.images import EncodedImage
from shared.lm import model_identity, resolve_model
from shared.lm.calls import Masked
from shared.lm.identity import quiet_transformers, read_config
from stage_harvest.config import AudioCorpus, HarvestSchema, ImagesCorpus
from stage_harvest.corpus import in_order
from stage_harvest.corpus.media import Images, MediaFiles, Sound, Sounds
from stage_harvest.factory.made import KnownModel, encoder_of

BATCH_IMAGES = 16


@dataclass(frozen=True)
class MediaModel(KnownModel):
    """A model, its processor, and the files that it reads."""

    processor: Any

    def record(self) -> dict[str, Any]:
        return {**super().record(), "processor": {"hash": settings_hash(self.processor)}}


def media_model(cfg: HarvestSchema, device: torch.device) -> MediaModel:
    """The model, and its batches from the files of the corpus. Raises GranaryError for what can't be had or read."""
    path, revision, corpus = cfg.model.path, cfg.model.revision, cfg.corpus
    if cfg.model.quantisation is not None:
        raise GranaryError("model.quantisation is for decoders, which is not what is harvested here: leave it out")
    config = read_config(path, revision)
    source: MediaFiles[Any]
    if isinstance(corpus, AudioCorpus):
        source, processor = Sounds(corpus.files, corpus.column), load_processor(path, revision, "audio")
        inputs: Callable[[Iterator[Any]], Iterator[Any]] = lambda items: sounds(items, processor, config)  # noqa: E731
    else:
        assert isinstance(corpus, ImagesCorpus)
        source, processor = Images(corpus.files, corpus.column), load_processor(path, revision, "images")
        inputs = lambda items: images(items, processor)  # noqa: E731

    def batches(seed: int) -> Iterator[Any]:
        return inputs(in_order(source.items, corpus, seed))

    model = encoder_of(cfg, device)
    tower = getattr(model, "vision_model", None)  # of CLIP, SigLIP: beside a text tower that is not run
    model = tower if isinstance(corpus, ImagesCorpus) and isinstance(tower, nn.Module) else model
    known = model_identity(path, revision, cfg.model.dtype.value)
    return MediaModel(path, model, as_floats_of(model, batches), config.model_type, known, source, processor)


def load_processor(path: str, revision: str | None, what: str) -> Any:
    """What makes a model's inputs, without torchvision. Raises GranaryError where the folder has none that loads."""
    folder = resolve_model(path, revision)
    with quiet_transformers():
        try:
            if what == "audio":
                made: Any = AutoFeatureExtractor
                return made.from_pretrained(folder, trust_remote_code=False)
            # Not by way of the package, which gives a substitute where torchvision is missing.
            from transformers.models.auto.image_processing_auto import AutoImageProcessor

            made = AutoImageProcessor
            return made.from_pretrained(folder, backend="pil", trust_remote_code=False)
        except Exception as error:  # of several libraries, from files that may hold anything
            raise GranaryError(f"model {path} has no processor of {what} that loads: {told_of(error)}") from error


def sounds(items: Iterator[Sound], extractor: Any, config: Any) -> Iterator[Any]:
    """A batch for each sound. Where the model pads it (Whisper), frames behind its end do not count."""
    for sound in items:
        if sound.rate != extractor.sampling_rate:
            raise GranaryError(
                f"{sound.where} has {sound.rate:,} samples per second, and the model wants"
                f" {extractor.sampling_rate:,}: resample it"
            )
        made = extractor(sound.samples, sampling_rate=sound.rate, return_tensors="pt", return_attention_mask=True)
        (name,) = [one for one in made if one.startswith("input_")]
        frames, mask = getattr(config, "max_source_positions", None), made.get("attention_mask")
        if frames is None or mask is None or name != "input_features":
            yield {name: made[name]}
        else:
            yield Masked({name: made[name]}, mask[:, :: mask.shape[1] // frames].bool())


def images(items: Iterator[EncodedImage], processor: Any) -> Iterator[dict[str, Tensor]]:
    """Batches of neighbours whose pixels have the same shape."""
    held: list[Tensor] = []
    for image in items:
        try:
            pixels: Tensor = processor(images=[image.decode()], return_tensors="pt")["pixel_values"]
        except (ValueError, TypeError) as error:
            raise GranaryError(f"{image.where}: the model's processor refuses it: {told_of(error)}") from error
        if held and (len(held) == BATCH_IMAGES or held[0].shape != pixels.shape):
            yield {"pixel_values": torch.cat(held)}
            held = []
        held.append(pixels)
    if held:
        yield {"pixel_values": torch.cat(held)}


def as_floats_of(model: nn.Module, batches: Callable[[int], Iterator[Any]]) -> Callable[[int], Iterator[Any]]:
    """The same batches, float numbers in the type of the model's weights."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())

    def cast(batch: Any) -> Any:
        if isinstance(batch, Masked):
            return Masked(cast(batch.inputs), batch.mask)
        return {name: tensor.to(dtype) for name, tensor in batch.items()}

    return lambda seed: map(cast, batches(seed))


def settings_hash(processor: Any) -> str:
    """SHA-256 of a processor's settings."""
    settings = {key: value for key, value in processor.to_dict().items() if key != "transformers_version"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
