"""Edits on kinds of tokens and in boxes of images: exactly those positions change, padded or cached, in any family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.intervene.attach import attach
from shared.intervene.edits import Edit
from shared.intervene.splice import SplicedModel
from shared.intervene.where import Where
from shared.lm.vision.layout import NO_CELL
from shared.lm.vision.reader import VisionReader
from tests.modules import sae_of
from tests.picture_models import picture_model, quick_first, tokenizer
from tests.splicing import HOOK, prompt, tiny_llama

Image = pytest.importorskip("PIL.Image")
PLACE, LATENT = "layers.1.resid_pre", 5
BOX = (0.0, 0.0, 50.0, 30.0)
# Rows of a batch: the sizes of their images; the second image of the first row is upright.
SIZES = [[(64, 48), (40, 60)], [(56, 56)]]


class Case:
    """A model of one family, its rows and their images."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.model = family, picture_model(family, folder)
        self.reader = VisionReader.load(str(folder))
        self.rows = [[Image.fromarray(noise(*size)) for size in row] for row in SIZES]
        self.shown = self.reader.shown(self.rows)

    def batch(self, side: str, rows: int = 2) -> dict[str, Any]:
        """The rows padded to one length on a side."""
        ids = [[1, 9], [1, 9, 10, 13]][:rows]
        for own, images in zip(ids, self.rows, strict=False):
            for image in images:
                layout = self.reader.layout(*image.size, len(images), "here")
                own += [*[self.reader.image_id] * len(layout), 11, 12]
        length = max(map(len, ids))
        gaps = [[0] * (length - len(own)) for own in ids]
        padded = [gap + own if side == "left" else own + gap for own, gap in zip(ids, gaps, strict=True)]
        mask = [[0] * len(gap) + [1] * len(own) if side == "left" else [1] * len(own) + [0] * len(gap)
                for own, gap in zip(ids, gaps, strict=True)]  # fmt: skip
        nested = self.reader.family.nested
        images: Any = self.rows[:rows] if nested else [image for row in self.rows[:rows] for image in row]
        made = self.reader.processor(images=images, return_tensors="pt")
        given = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask), **made}
        given.pop("num_crops", None)
        if self.reader.family.type_ids is not None:
            given[self.reader.family.type_ids] = (given["input_ids"] == self.reader.image_id).long()
        return given

    def expected(self, ids_BT: Tensor, image: int, box: tuple[float, ...] | None) -> Tensor:
        """The regions of an image that lie in the box, one token after the other."""
        found = torch.zeros_like(ids_BT, dtype=torch.bool)
        for row, sizes in enumerate(SIZES[: len(ids_BT)]):
            places = iter((ids_BT[row] == self.reader.image_id).nonzero()[:, 0].tolist())
            for number, size in enumerate(sizes):
                layout = self.reader.layout(*size, len(sizes), "here")
                for grid, cell in zip(layout.grid_L.tolist(), layout.cell_L2.tolist(), strict=True):
                    place = next(places)
                    if number != image or cell[0] == NO_CELL:
                        continue
                    left, top, right, bottom = layout.grids[grid].box(*cell)
                    found[row, place] = box is None or all(
                        (left > box[0] - 0.51, top > box[1] - 0.51, right < box[2] + 0.51, bottom < box[3] + 0.51)
                    )
        return found


def noise(width: int, height: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy()


@pytest.fixture(scope="module", params=quick_first())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def entering(model: Any, run: Any) -> Tensor:
    """What the layer behind the splice reads."""
    seen: list[Tensor] = []
    norm = model.get_decoder().layers[1].input_layernorm
    handle = norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        run()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_only_the_regions_in_the_box_change(case: Case, side: str) -> None:
    inputs, sae = case.batch(side), sae_of(16)
    clean = entering(case.model, lambda: case.model(**inputs))
    for image, box in ((0, BOX), (0, None), (1, BOX)):
        edits = [Edit([LATENT], "set", 30.0, where=Where(image=image, box=box))]
        wanted = case.expected(inputs["input_ids"], image, box)
        assert 0 < wanted.sum() < (inputs["input_ids"] == case.reader.image_id).sum()
        spliced = SplicedModel(case.model, sae, PLACE, edits=edits, pictures=case.shown)
        changed = entering(case.model, lambda spliced=spliced: spliced(**inputs))
        assert torch.equal((changed != clean).any(-1), wanted)
        assert torch.equal(spliced.features.applied, wanted)
        assert (spliced.features.after.to_dense(sae.config.d_latent)[wanted][:, LATENT] == 30).all()
        with attach(case.model, {PLACE: sae}, mode="replace", keep_error=True, edits={PLACE: edits},
                    pictures=case.shown):  # fmt: skip
            assert torch.equal(entering(case.model, lambda: case.model(**inputs)), changed)


def test_a_caption_is_generated_with_the_edit_in_the_box_alone(case: Case) -> None:
    inputs, edits = case.batch("left"), [Edit([LATENT], "set", 30.0, where=Where(image=0, box=BOX))]
    spliced = SplicedModel(case.model, sae_of(16), PLACE, edits=edits, pictures=case.shown)
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [case.reader.image_id]}
    made = spliced.generate(**inputs, **settings)
    wanted, length = case.expected(inputs["input_ids"], 0, BOX), inputs["input_ids"].shape[1]
    assert torch.equal(spliced.features.applied[:, :length], wanted)
    assert not spliced.features.applied[:, length:].any()
    assert spliced.features.applied.shape[1] == length + 3
    assert not torch.equal(made, case.model.generate(**inputs, **settings))
    with attach(case.model, {PLACE: sae_of(16)}, mode="replace", keep_error=True, edits={PLACE: edits},
                pictures=case.shown):  # fmt: skip
        assert torch.equal(case.model.generate(**inputs, **settings), made)


def test_kinds_part_the_tokens(case: Case) -> None:
    inputs, found = case.batch("left"), {}
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    for kind in ("image", "text", "generated"):
        edits = [Edit([LATENT], "add", 1.0, where=Where(kinds=[kind]))]
        spliced = SplicedModel(case.model, sae_of(16), PLACE, edits=edits, pictures=case.shown)
        spliced.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False,
                         suppress_tokens=[case.reader.image_id])  # fmt: skip
        found[kind] = spliced.features.applied
    regions = sum(case.expected(ids, image, None).long() for image in (0, 1)).bool()
    assert torch.equal(found["image"][:, :length], regions)
    assert not found["image"][:, length:].any()
    assert torch.equal(found["text"][:, :length], torch.isin(ids, torch.tensor([9, 10, 11, 12, 13])))
    assert torch.equal(found["generated"], torch.arange(length + 2).expand(2, -1) >= length)


def test_images_that_are_not_those_of_the_prompt_are_one_line(case: Case) -> None:
    inputs, sae = case.batch("right"), sae_of(16)

    def refused(match: str, where: Where, pictures: Any) -> None:
        with pytest.raises(GranaryError, match=match):
            SplicedModel(case.model, sae, PLACE, edits=[Edit([1], "set", 1.0, where=where)], pictures=pictures)(
                **inputs
            )

    box = Where(image=0, box=BOX)
    refused(r"pictures=VisionReader.load\(model\)\.shown", box, None)
    refused("no image 2: rows have at most 2", Where(image=2), case.shown)
    refused(
        r"no region of image 0 \(64 x 48 pixels\) lies wholly in the box", Where(image=0, box=(1, 1, 3, 3)), case.shown
    )
    three = case.reader.shown([SIZES[0], SIZES[1], SIZES[1]])
    refused("the batch has 2 rows, and images are given for 3", box, three)
    other = case.reader.shown([SIZES[0], []])
    refused(r"row 1 of the batch has \d+ image tokens, and its images \(none pixels\) make 0", box, other)
    with pytest.raises(GranaryError, match="give a list for each row, of PIL images"):
        case.reader.shown([(64, 48)])  # type: ignore[list-item]
    with pytest.raises(GranaryError, match="no rows"):
        case.reader.shown([])


def test_the_cells_of_a_box_by_hand(tmp_path: Path) -> None:
    """LLaVA sees the middle 28 x 28 pixels of a picture of 56 x 28, in 4 x 4 cells of 7 pixels."""
    picture_model("llava", tmp_path)
    reader = VisionReader.load(str(tmp_path))
    ids = torch.full((1, 16), reader.image_id)
    regions = reader.shown([[(56, 28)]]).regions(ids, torch.tensor([0]), torch.ones_like(ids).bool(), is_end=True)
    assert regions.inside(0, (21, 7, 35, 21)).nonzero()[:, 1].tolist() == [5, 6, 9, 10]
    assert regions.inside(0, (20, 6, 36, 22)).nonzero()[:, 1].tolist() == [5, 6, 9, 10]
    assert regions.inside(0, (22, 7, 35, 21)).nonzero()[:, 1].tolist() == [6, 10]


def test_a_prompt_is_what_the_reader_makes_of_a_text(case: Case) -> None:
    made, images = tokenizer(), case.rows[0]
    placeholder = made.convert_ids_to_tokens(case.reader.placeholder_id)
    given = case.reader.prompt(made, f"one {placeholder} two {placeholder}", images)
    count = sum(len(one) for one in case.shown.layouts[0])
    assert (given["input_ids"] == case.reader.image_id).sum() == count
    with torch.no_grad():
        assert torch.isfinite(case.model(**given).logits).all()
    with pytest.raises(GranaryError, match=r"the text has 1 placeholders .*, and 2 images are given"):
        case.reader.prompt(made, f"one {placeholder}", images)


def test_what_says_no_place_is_one_line() -> None:
    for match, settings in (
        ("kinds=.*not known: give a list of text, image, generated", {"kinds": ["picture"]}),
        ("kinds='text' is not known", {"kinds": "text"}),
        ("says no place: give kinds", {}),
        ("a box is in an image: give image=0", {"box": BOX}),
        ("two ways to choose", {"kinds": ["text"], "image": 0}),
        ("no number of an image", {"image": -1}),
        ("is empty: give left < right", {"image": 0, "box": (5, 5, 5, 9)}),
        ("give left, top, right and bottom", {"image": 0, "box": (5, 5, 9)}),
        ("give left, top, right and bottom", {"image": 0, "box": (5, 5, 9, float("nan"))}),
    ):
        with pytest.raises(GranaryError, match=match):
            Where(**settings)


def test_kinds_of_a_model_of_text_alone() -> None:
    model, ids = tiny_llama(), torch.cat([torch.zeros(2, 2, dtype=torch.int64), prompt()], 1)
    given = {"attention_mask": (ids != 0).long(), "max_new_tokens": 3, "do_sample": False}

    def applied(kind: str, **settings: Any) -> Tensor:
        edits = [Edit([1], "add", 1.0, where=Where(kinds=[kind]))]
        spliced = SplicedModel(model, sae_of(16), HOOK, edits=edits, **settings)
        made = spliced.generate(ids, **given)[:, :-1]
        later = torch.arange(made.shape[1]) >= ids.shape[1]
        wanted = later.expand_as(made) if kind == "generated" else ~torch.isin(made, torch.tensor([0, 1, 2]))
        assert torch.equal(spliced.features.applied, wanted)
        return made

    assert torch.equal(applied("text"), applied("text", include_bos=True))
    applied("generated")
    edits = [Edit([1], "add", 1.0, where=Where(kinds=["generated"]))]
    attached = attach(model, {HOOK: sae_of(16)}, mode="replace", keep_error=True, edits={HOOK: edits})
    with attached, pytest.raises(GranaryError, match="needs SplicedModel"):
        model.generate(ids, **given)
    with pytest.raises(GranaryError, match="opensae_compat edits every token"):
        SplicedModel(model, sae_of(16), HOOK, edits=edits, opensae_compat=True)
    embedded = model.get_input_embeddings()(prompt())
    with pytest.raises(GranaryError, match="told by token ids"):
        SplicedModel(model, sae_of(16), HOOK, edits=edits)(inputs_embeds=embedded)


def test_edits_in_places_of_their_own_and_no_error_term(case: Case) -> None:
    inputs, sae = case.batch("left", rows=1), sae_of(16)
    edits = [
        Edit([LATENT], "set", 30.0, where=Where(image=0, box=BOX)),
        Edit([2], "set", 20.0, where=Where(kinds=["text"])),
    ]
    shown = case.reader.shown(case.rows[:1])
    spliced = SplicedModel(case.model, sae, PLACE, edits=edits, pictures=shown, keep_error=False)
    with torch.no_grad():
        spliced(**inputs)
    before, after = (one.to_dense(sae.config.d_latent) for one in (spliced.features.before, spliced.features.after))
    wanted = before.clone()
    wanted[case.expected(inputs["input_ids"], 0, BOX), LATENT] = 30
    wanted[torch.isin(inputs["input_ids"], torch.tensor([9, 10, 11, 12, 13])), 2] = 20
    assert torch.equal(after, wanted)
    replaced = entering(case.model, lambda: spliced(**inputs))
    acts = spliced.features.applied
    assert torch.allclose(replaced[acts], sae.decode(spliced.features.after)[acts], atol=1e-5)
