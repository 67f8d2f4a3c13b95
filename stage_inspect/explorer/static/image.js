// Which latents fire in a box of an image: drawn with the pointer, or written as numbers.

import { afterwards, choice, h, replace, s } from "./dom.js";
import { count, figure, number, share } from "./format.js";
import { chip } from "./tokens.js";

const SIDES = ["left", "top", "right", "bottom"];
const SORTS = [
  ["contrast", "contrast", "by the mean inside less the mean outside"],
  ["strength", "strength", "by the largest activation of a region inside"],
  ["share", "share", "by the part of its activation in this image that lies inside"],
];
const WEIGHTS = { contrast: ({ inside, outside }) => inside - outside, strength: (one) => one.strength,
  share: (one) => one.share };
const remembered = { sort: "contrast" };

/** The page of the images of context `argument`. */
export async function imagePage(source, [argument = "0"], query) {
  const { contexts } = source.meta.box;
  const context = Number(argument);
  if (!Number.isInteger(context) || context < 0 || context >= contexts) throw new Error(`There is no context ${argument}.`);
  const { images } = await source.ask(`images/${context}`);
  const step = (other, sign, name) => other < 0 || other >= contexts ? h("span.button.off", { "aria-hidden": "true" }, sign)
    : h("a.button", { href: `#/image/${other}`, "aria-label": `${name}: ${other}`, title: name }, sign);
  const go = h("input", { type: "number", min: "0", max: String(contexts - 1), value: String(context),
    "aria-label": "Context of the store", onchange: () => { location.hash = `#/image/${go.value}`; } });
  const wanted = images.findIndex(({ sha256 }) => sha256 === query.get("sha256"));
  const place = h("div");
  const open = (at) => replace(place, images.length ? boxPanel(source, context, images[at])
    : h("p.remark", {}, "This context has no image."));
  const chosen = Math.max(0, wanted);
  open(chosen);
  return {
    title: `Image of context ${context}`,
    content: [
      h("div.title", {}, h("div", {}, h("h1", {}, "What fires in a box"),
        h("p.lead", {}, `An image of the store: draw a box on it, or write one. Context ${count(context)} of ${count(contexts)}.`)),
      h("div.actions", {}, step(context - 1, "←", "Previous context"), go, step(context + 1, "→", "Next context"),
        images.length > 1 && choice("Image", images.map((_, at) => [at, `image ${at + 1}`]), chosen, open))),
      place,
    ],
  };
}

/** One image with its box, and the latents that fire in it. */
function boxPanel(source, context, image) {
  const { width, height } = image;
  let box = [width / 4, height / 4, width * 3 / 4, height * 3 / 4].map(Math.round);
  let from = null;
  let turn = 0;
  let answer = null;
  const told = h("p.caption", { role: "status" });
  const list = h("ol.found.boxed", { "aria-label": "Latents that fire in the box" });
  const drawn = s("rect.box");
  const frame = h("div.picture.drawing", { onpointerdown: begin, onpointermove: drag, onpointerup: end, onpointercancel: end },
    h("img", { src: image.address, alt: `Image of context ${context}, ${width} by ${height} pixels`, draggable: "false" }),
    s("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" }, drawn));
  const fields = SIDES.map((side, at) => h("input", { type: "number", min: "0", max: String(at % 2 ? height : width), step: "any",
    "aria-label": `${side} of the box in pixels`, oninput: () => { box[at] = Number(fields[at].value); show(); later(); } }));

  async function ask() {
    const mine = (turn += 1);
    try {
      const found = await source.ask("box", { context, number: image.number, box });
      if (mine !== turn) return;
      answer = found;
      list_all();
    } catch (error) {
      if (mine !== turn) return;
      replace(told, h("span.error", {}, error.message));
      replace(list);
    }
  }
  const later = afterwards(ask, 200);

  function show() {
    const [left, top, right, bottom] = box;
    drawn.setAttribute("x", left);
    drawn.setAttribute("y", top);
    drawn.setAttribute("width", Math.max(0, right - left));
    drawn.setAttribute("height", Math.max(0, bottom - top));
  }
  function set(sides) {
    box = sides.map(Math.round);
    fields.forEach((field, at) => { field.value = String(box[at]); });
    show();
  }
  function pixel(event) {
    const area = frame.getBoundingClientRect();
    return [Math.max(0, Math.min(width, (event.clientX - area.left) / area.width * width)),
      Math.max(0, Math.min(height, (event.clientY - area.top) / area.height * height))];
  }
  function begin(event) {
    from = pixel(event);
    frame.setPointerCapture(event.pointerId);
    event.preventDefault();
  }
  function drag(event) {
    if (!from) return;
    const [x, y] = pixel(event);
    set([Math.min(from[0], x), Math.min(from[1], y), Math.max(from[0], x), Math.max(from[1], y)]);
  }
  function end() {
    if (from) later();
    from = null;
  }

  function list_all() {
    replace(told, `${count(answer.total)} latents fire on the ${number(answer.regions)} regions inside.`);
    const weight = WEIGHTS[remembered.sort];
    const sorted = [...answer.latents].sort((one, other) => weight(other) - weight(one));
    replace(list, sorted.map((one) => h("li", { "data-latent": one.latent },
      h("a.named", { href: `#/latent/${one.latent}` }, h("b", {}, String(one.latent)), " ", h("span.told")),
      h("span.num", { title: "largest activation inside" }, figure(one.strength)),
      h("span.num.dim", { title: `mean inside ${number(one.inside)}, outside ${number(one.outside)}` },
        `${share(one.share)} inside`))));
    for (const { latent } of sorted) {
      source.rows(Math.floor(latent / source.meta.block)).then((rows) => {
        const [name, tokens] = rows[String(latent)] ?? [null, []];
        const at = list.querySelector(`[data-latent="${latent}"] .told`);
        if (at) replace(at, name ?? tokens.slice(0, 3).map((token) => [chip(token), " "]));
      }).catch(() => {});
    }
  }

  set(box);
  ask();
  return h("div.text-page", {},
    h("section.panel", {}, h("h2", {}, "Image"), frame,
      h("div.fields.sides", {}, fields.map((field, at) => h("label", {}, h("span", {}, SIDES[at]), field))), told),
    h("section.panel", {}, h("div.head", {}, h("h2", {}, "Latents"), h("span.grow"),
      choice("Order", SORTS, remembered.sort, (sort) => { remembered.sort = sort; if (answer) list_all(); })), list));
}
