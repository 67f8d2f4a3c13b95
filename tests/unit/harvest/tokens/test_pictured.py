"""Rows with images to contexts, against a slow plain reading of them, for every family."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.basics.errors import GranaryError
from shared.basics.images import EncodedImage
from shared.lm import load_tokenizer, special_ids
from shared.lm.vision.reader import VisionReader
from shared.store.format.image_table import ASSISTANT, IMAGE, MARKS_KIND, PADDING, SPECIAL, STRUCTURE, TEXT
from stage_harvest.config import BosPlacement, LongDocuments, PackingMode, PackingSchema
from stage_harvest.corpus import Chat, Document, Pictured
from stage_harvest.tokens.packing import Packer
from stage_harvest.tokens.pictured import PicturedContext, PicturedTokeniser
from stage_harvest.tokens.template import ChatRenderer
from tests.picture_models import PLACEHOLDERS, picture_model, quick_first

pytest.importorskip("PIL")
from tests import picture_corpus

# Families whose own processor works without torchvision.
WITH_PROCESSOR = ("llava", "llava_next", "gemma3")


@pytest.fixture(scope="module", params=quick_first())
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / request.param
    picture_model(request.param, made)
    return made


def tokeniser(folder: Path, *, seq_len: int = 320, cut: bool = False, template: str | None = None) -> PicturedTokeniser:
    tokenizer = load_tokenizer(str(folder))
    if template is not None:
        tokenizer.chat_template = template
    packing = PackingSchema(
        mode=PackingMode.separate, seq_len=seq_len, bos=BosPlacement.document, drop_last=False, mask_special=True,
        long_documents=LongDocuments.truncate if cut else LongDocuments.split, mask_first=None,
    )  # fmt: skip
    special = special_ids(tokenizer)
    chats = ChatRenderer(tokenizer, date(2026, 1, 1))
    reader = VisionReader.load(str(folder))
    return PicturedTokeniser(reader, tokenizer, chats, Packer.from_config(packing, special), special, assistant=True)


def documents() -> Iterator[Document]:
    for number, (messages, numbers) in enumerate(picture_corpus.rows(), 1):
        images = tuple(EncodedImage(picture_corpus.picture(n), f"row {number}, image {i}", f"{n}.png")
                       for i, n in enumerate(numbers, 1))  # fmt: skip
        yield Document(Pictured(Chat(messages), images, f"rows row {number}"), f"rows row {number}")


def kinds(context: PicturedContext) -> np.ndarray:
    return context.kind_T & MARKS_KIND


def test_assistant_kinds_images_and_cells(folder: Path) -> None:
    made = tokeniser(folder)
    found = list(made.contexts(documents()))
    assert len(found) == len(picture_corpus.rows())
    next_row = 0
    for number, (context, (_, shown)) in enumerate(zip(found, picture_corpus.rows(), strict=True)):
        said = made.tokenizer.decode(context.tokens_T[context.kind_T >= ASSISTANT])
        answers = [*picture_corpus.ANSWERS, ["x"]][number]
        assert said == "".join(answer + made.tokenizer.eos_token for answer in answers)
        layouts = [made.vision.layout(*picture_corpus.SHAPES[n], len(shown), "here") for n in shown]
        is_image = context.tokens_T == made.vision.image_id
        assert is_image.sum() == sum(map(len, layouts))
        rows_seen, cells_seen = [], []
        for layout in layouts:
            rows_seen += (next_row + layout.grid_L).tolist()
            cells_seen += layout.cell_L2.tolist()
            next_row += len(layout.grids)
        assert context.image_T[is_image].tolist() == rows_seen
        assert context.cell_T2[is_image].tolist() == cells_seen
        assert (context.image_T[~is_image] == -1).all()
        assert (context.cell_T2[~is_image] == -1).all()
        has_cell = context.cell_T2[:, 0] >= 0
        assert np.array_equal(kinds(context) == IMAGE, has_cell)
        marks = is_image & ~has_cell | np.isin(context.tokens_T, made.vision.structure_ids)
        assert np.array_equal(kinds(context) == STRUCTURE, marks)
        padded = context.segments_T < 0
        assert np.array_equal(kinds(context) == PADDING, padded)
        assert set(context.tokens_T[kinds(context) == SPECIAL]) <= {made.special.bos, made.special.eos}
        assert np.array_equal(context.mask_T, np.isin(kinds(context), (TEXT, IMAGE)))
        assert [row.id for row in context.rows] == sorted(set(rows_seen))
        assert {row.context for row in context.rows} <= {number}
        digests = [image.sha256 for image in context.images]
        assert all(row.sha256 == digests[row.number] for row in context.rows)
        assert all((row.width, row.height) == picture_corpus.SHAPES[shown[row.number]] for row in context.rows)
    assert len({row.sha256 for row in found[2].rows}) == 2  # of three images, one twice


def test_ids_and_inputs_are_those_of_the_processor(folder: Path) -> None:
    if folder.name not in WITH_PROCESSOR:
        pytest.skip(f"the processor of {folder.name} needs torchvision")

    made = tokeniser(folder)
    reader, tokenizer = made.vision, made.tokenizer
    marks = dict(zip(("image_token", "boi_token", "eoi_token"), ("<image>", "<start>", "<end>"), strict=True))
    for name, mark in marks.items():
        setattr(tokenizer, name, mark)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(mark))
    tokenizer.split_special_tokens = False
    tokenizer.backend_tokenizer.encode_special_tokens = False
    if folder.name == "gemma3":
        from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

        processor: Any = Gemma3Processor(reader.processor, tokenizer, image_seq_length=4)
    else:
        from transformers.models.llava.processing_llava import LlavaProcessor
        from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

        kind = LlavaProcessor if folder.name == "llava" else LlavaNextProcessor
        processor = kind(reader.processor, tokenizer, patch_size=7, vision_feature_select_strategy="default",
                         num_additional_image_tokens=1)  # fmt: skip
    for document, context in zip(documents(), made.contexts(documents()), strict=True):
        row = document.content
        assert isinstance(row, Pictured)
        assert isinstance(row.text, Chat)
        images = [image.decode() for image in row.images]
        text = made.chats.render(row.text, "here")
        theirs = processor(images=images or None, text=text, return_tensors="pt", add_special_tokens=False)
        ids_L = torch.from_numpy(context.tokens_T[context.segments_T == 0].astype(np.int64))
        ours = reader.inputs(ids_L, images)
        assert ours.pop("use_cache") is False
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


def test_a_row_that_does_not_fit(folder: Path) -> None:
    if folder.name != "qwen3_vl":
        pytest.skip("the same of every family")
    image = EncodedImage(picture_corpus.picture(0), "row 1, image 1")
    room = len(tokeniser(folder).vision.layout(50, 30, 1, "here")) + 6
    before = Document(Pictured("<image> and then much more text than there is room for", (image,), "row 1"), "row 1")
    with pytest.raises(GranaryError, match=r"row 1 takes \d+ tokens, and rows with images are not split"):
        list(tokeniser(folder, seq_len=room).contexts([before]))
    (context,) = tokeniser(folder, seq_len=room, cut=True).contexts([before])
    assert (kinds(context) == IMAGE).sum() == room - 6
    assert (context.segments_T == 0).all()
    behind = replace(before.content, text="more text than there is room for, and then <image>")  # type: ignore[type-var]
    with pytest.raises(GranaryError, match=r"row 1 takes (\d+) tokens, and an image is not cut: .*seq_len=\1"):
        list(tokeniser(folder, seq_len=room, cut=True).contexts([Document(behind, "row 1")]))


def test_what_is_wrong_with_a_row_is_one_line(folder: Path) -> None:
    if folder.name != "gemma3":
        pytest.skip("the same of every family")
    image = EncodedImage(picture_corpus.picture(0), "row 1, image 1")
    mark = PLACEHOLDERS["gemma3"]
    for text, images, told in (
        ("no placeholder", (image,), r"row 1 has 1 images, and its text 0 placeholders for them \(<start>\)"),
        (f"{mark}{mark}", (image,), "row 1 has 1 images, and its text 2 placeholders"),
        (f"{mark} <image>", (image,), "row 1 has 1 images, and its text 2 placeholders"),
        (mark, (EncodedImage(b"GIF89a", "row 1, image 1"),), "row 1, image 1 is no image that can be read"),
    ):
        with pytest.raises(GranaryError, match=told):
            list(tokeniser(folder).contexts([Document(Pictured(text, images, "row 1"), "row 1")]))
    plain = "{% for message in messages %}{{ message.role }}{% endfor %}"
    made = tokeniser(folder, template=plain)
    assert not made.chats.has_generation_tags
    with pytest.raises(GranaryError, match=r"chat\.mark_assistant=true: .* no \{% generation %\} tags"):
        made.chats.require_generation_tags()
    assert list(tokeniser(folder).contexts([Document(Pictured("", (), "row 1"), "row 1")])) == []


def test_pictures_of_a_row_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if folder.name != "llava_next":
        pytest.skip("the same of every family")
    seen: list[str] = []
    decode = EncodedImage.decode
    monkeypatch.setattr(EncodedImage, "decode", lambda self: seen.append(self.where) or decode(self))
    rows = list(documents())
    list(tokeniser(folder).contexts(rows))
    assert seen == [image.where for row in rows for image in row.content.images]  # type: ignore[union-attr]
