"""Train a small vision-language model that says what coloured shapes a picture shows, to look for their latents.

    python examples/shapes.py shapes

leaves ``shapes/rows.parquet`` and ``shapes/heldout.parquet``, pictures with captions, the second apart from all that is
trained, and ``shapes/model``: a LLaVA of two small towers, which has learnt the captions of the first. At the end it
says how many captions of the second come out right. Needs pillow (the extra ``vision``).

Every picture has a number, and the number makes the picture: two shapes on a noisy grey ground, one in each half,
the same number the same pixels. So the mask of every shape is known exactly.
"""

import argparse
import io
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

COLOURS = {
    "red": (210, 40, 40), "orange": (235, 130, 30), "yellow": (225, 205, 40), "green": (40, 170, 60),
    "cyan": (50, 195, 205), "blue": (50, 70, 220), "purple": (160, 50, 190), "pink": (240, 140, 190),
}  # fmt: skip
FORMS = ("circle", "square", "triangle")
SIDE, PATCH = 48, 8  # pixels of a picture, and of a cell, which is a token
GRID = SIDE // PATCH
CELLS = GRID**2
Y, X = np.mgrid[:SIDE, :SIDE]  # of each pixel
DOWN, RIGHT = Y % 4 < 2, X % 4 < 2
PATTERNS = {  # the pixels that are light, as on a paper that lies under every picture
    "plain": DOWN | True, "barred": DOWN, "striped": RIGHT, "checked": DOWN ^ RIGHT, "dotted": DOWN & RIGHT,
    "netted": DOWN | RIGHT, "slanted": (X + Y) % 4 < 2, "banded": Y % 8 < 4,
}  # fmt: skip
HELDOUT = 1_000_000  # the number of the first picture that nothing is trained on
WIDTH = 48  # of both towers
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% for part in message.content -%}
{% if part.type == 'image' %}<image>{% else -%}
{% generation %}{{ part.text }}{{ eos_token }}{% endgeneration %}{% endif -%}
{% endfor %}{% endfor %}"""


@dataclass(frozen=True)
class Thing:
    """One shape of a picture; a square of `size` pixels with its upper left corner at (left, top) holds it."""

    colour: str
    pattern: str
    form: str
    left: int
    top: int
    size: int

    @property
    def name(self) -> str:
        """What a caption calls it."""
        return f"{self.pattern} {self.colour}"

    def mask(self) -> npt.NDArray[np.bool_]:
        """Its pixels [SIDE, SIDE]."""
        y, x = (Y + 0.5 - self.top) / self.size, (X + 0.5 - self.left) / self.size  # 0 to 1 inside
        if self.form == "circle":
            return np.hypot(x - 0.5, y - 0.5) < 0.5
        if self.form == "triangle":
            return (abs(x - 0.5) < y / 2) & (y < 1)
        return (abs(x - 0.5) < 0.45) & (abs(y - 0.5) < 0.45)


def scene(number: int) -> tuple[Thing, Thing]:
    """The shapes of the left and the right half of a picture."""
    rng, half = random.Random(number), SIDE // 2

    def thing(start: int) -> Thing:
        size = rng.randrange(16, 23)
        left, top = start + rng.randrange(1, half - size), rng.randrange(1, SIDE - size)
        return Thing(rng.choice(list(COLOURS)), rng.choice(list(PATTERNS)), rng.choice(FORMS), left, top, size)

    return thing(0), thing(half)


def caption(things: Sequence[Thing]) -> str:
    """What the model is to say."""
    return " and".join(f" {thing.name}" for thing in things)


@cache
def drawn(number: int) -> Any:
    """The picture, a PIL image: noisy grey, the shapes in a shade of their colours."""
    from PIL import Image

    rng = np.random.default_rng(number)
    pixels = np.full((SIDE, SIDE, 3), rng.uniform(60, 200))
    for thing in scene(number):
        shade = (COLOURS[thing.colour] + rng.uniform(-25, 25, 3)) * rng.uniform(0.7, 1.1)
        filled = np.where(PATTERNS[thing.pattern][..., None], shade, 0.35 * shade)
        pixels = np.where(thing.mask()[..., None], filled, pixels)
    return Image.fromarray((pixels + rng.uniform(-30, 30, pixels.shape)).clip(0, 255).astype(np.uint8))


def write_rows(file: Path, numbers: Sequence[int]) -> None:
    """A row for each picture, as Hugging Face writes them; the path of an image is its number."""
    messages, images = [], []
    for number in numbers:
        buffer = io.BytesIO()
        drawn(number).save(buffer, "PNG")
        asked = {"role": "user", "content": [{"type": "image", "text": None}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": caption(scene(number))}]}
        messages.append([asked, said])
        images.append([{"bytes": buffer.getvalue(), "path": f"{number}.png"}])
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"messages": messages, "images": pa.array(images, pa.list_(image))}), file)


def made_tokenizer() -> Any:
    """Bytes, and the words of captions, each a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<image>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([caption(scene(number)) for number in range(200)], trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                    additional_special_tokens=["<image>"])  # fmt: skip
    whole.chat_template = TEMPLATE
    return whole


def made_model(tokenizer: Any, seed: int) -> Any:
    """A LLaVA of random weights, one token for each cell: one layer that sees, two that speak."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    both = {"hidden_size": WIDTH, "num_attention_heads": 4}
    sees = {"intermediate_size": 4 * WIDTH, "num_hidden_layers": 1, "image_size": SIDE, "patch_size": PATCH}
    speaks = {"intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_key_value_heads": 4, "model_type": "llama",
              "max_position_embeddings": 128, "initializer_range": 0.12, "vocab_size": len(tokenizer),
              "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
              "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(**both, **sees)
    config = LlavaConfig(vision_config=vision, text_config=both | speaks, image_token_index=image_token,
                         vision_feature_layer=-1, initializer_range=0.12)  # fmt: skip
    return LlavaForConditionalGeneration(config)


def made_processor() -> Any:
    """Pixels as they are, scaled."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    return LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def batch(numbers: Sequence[int], tokenizer: Any, processor: Any) -> tuple[Tensor, Tensor]:
    """Pixels [N, 3, SIDE, SIDE], and token ids [N, T]: BOS, image tokens, caption, EOS; all captions are as long."""
    image_id, texts = tokenizer.convert_tokens_to_ids("<image>"), [caption(scene(number)) for number in numbers]
    said = torch.tensor(tokenizer(texts).input_ids)
    before = torch.tensor([tokenizer.bos_token_id] + CELLS * [image_id]).expand(len(numbers), -1)
    end = torch.full((len(numbers), 1), tokenizer.eos_token_id)
    pixels = processor(images=[drawn(number) for number in numbers], return_tensors="pt").pixel_values
    return pixels, torch.cat([before, said, end], 1)


def loss_of(model: Any, pixels: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of caption and EOS, in nats per token."""
    hidden = model.model(input_ids=ids[:, :-1], pixel_values=pixels).last_hidden_state[:, CELLS:]
    return nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), ids[:, CELLS + 1 :].flatten())


def trained(pictures: int, steps: int, size: int = 64, seed: int = 0) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor after `steps` steps of `size` of the first `pictures` pictures."""
    tokenizer, processor = made_tokenizer(), made_processor()
    model = made_model(tokenizer, seed)
    pixels, ids = batch(range(pictures), tokenizer, processor)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / 30) * (1 + math.cos(math.pi * step / max(1, steps))) / 2
    )
    for step in range(steps):
        chosen = torch.randint(pictures, (size,))
        loss = loss_of(model, pixels[chosen], ids[chosen])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1:5d}  loss {float(loss.detach()):.3f}", flush=True)  # noqa: T201
    return model.eval().requires_grad_(False), tokenizer, processor


def said_of(model: Any, tokenizer: Any, pixels: Tensor, **more: Any) -> list[str]:
    """The captions that the model gives, word by word the likeliest."""
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    ids = torch.tensor([tokenizer.bos_token_id] + CELLS * [image_id]).expand(len(pixels), -1)
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=10,
                          do_sample=False, **more)  # fmt: skip
    return tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Write pictures and model into the folder that is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=3072, help="that are trained on")
    parser.add_argument("--heldout", type=int, default=384)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    heldout = range(HELDOUT, HELDOUT + arguments.heldout)
    write_rows(arguments.folder / "rows.parquet", range(arguments.pictures))
    write_rows(arguments.folder / "heldout.parquet", heldout)
    start = time.perf_counter()
    model, tokenizer, processor = trained(arguments.pictures, arguments.steps, seed=arguments.seed)
    seconds = time.perf_counter() - start
    for part in (model, tokenizer, processor):
        part.save_pretrained(arguments.folder / "model")
    pixels, _ = batch(heldout, tokenizer, processor)
    said = said_of(model, tokenizer, pixels)
    right = np.mean([one == caption(scene(number)) for one, number in zip(said, heldout, strict=True)])
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{weights:,} weights, trained in {seconds:.0f} s; {right:.1%} of {len(said)} held-out captions are right")  # noqa: T201


if __name__ == "__main__":
    main()
