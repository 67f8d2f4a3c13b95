"""Make a small corpus of pictures with questions and answers, and a small model that reads it, to try a harvest on.

    python examples/pictures.py pictures

leaves ``pictures/rows.parquet``, with the columns ``messages`` and ``images`` as Hugging Face writes them, and
``pictures/model``: a LLaVA of random weights with the tokenizer of the bundled model. It has learnt nothing; it shows
how the parts go together. Needs pillow (the extra ``vision``).
"""

import argparse
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from shared.bundled import MODEL_DIR

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200), "yellow": (220, 200, 40)}
SHAPES = ("circle", "square")
SIDE, PATCH = 32, 8  # pixels of what the model sees, and of a token
# Says what the assistant writes, so that its tokens are marked.
TEMPLATE = """\
{%- macro shown(message) -%}
{%- for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor -%}
{%- endmacro -%}
{{ bos_token }}{% for message in messages %}{{ message.role + ':\\n' }}{% if message.role == 'assistant' -%}
{% generation %}{{ shown(message) }}{% endgeneration %}{% else %}{{ shown(message) }}{% endif %}{{ eos_token + '\\n' }}
{%- endfor %}"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write corpus and model into the folder that is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_rows(arguments.folder / "rows.parquet", arguments.rows)
    write_model(arguments.folder / "model")


def write_rows(file: Path, number: int) -> None:
    """Every row shows one shape of one colour, asks what it is, and says so."""
    rng = random.Random(0)
    messages, images = [], []
    for row in range(number):
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        question = [{"type": "image", "text": None}, {"type": "text", "text": "What is in the picture?"}]
        answer = [{"type": "text", "text": f"A {colour} {shape}."}]
        messages.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
        images.append([{"bytes": drawn(colour, shape, rng), "path": f"{row}.png"}])
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"messages": messages, "images": pa.array(images, pa.list_(image))}), file)


def drawn(colour: str, shape: str, rng: random.Random) -> bytes:
    """A picture of 64 x 48 pixels as PNG."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (64, 48), (230, 230, 230))
    left, top, size = rng.randrange(12, 32), rng.randrange(4, 24), rng.randrange(12, 20)
    draw: Any = ImageDraw.Draw(picture)
    outline = draw.ellipse if shape == "circle" else draw.rectangle
    outline((left, top, left + size, top + size), fill=COLOURS[colour])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_model(folder: Path) -> None:
    """A LLaVA of two layers, with all that reads a row with images."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=SIDE, patch_size=PATCH)  # fmt: skip
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "max_position_embeddings": 256, "initializer_range": 0.2}  # fmt: skip
    torch.manual_seed(0)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    size, crop = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    for part in (LlavaForConditionalGeneration(config), tokenizer, LlavaImageProcessorPil(size=size, crop_size=crop)):
        part.save_pretrained(folder)


if __name__ == "__main__":
    main()
