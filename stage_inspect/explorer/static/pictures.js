// Pictures that a latent fires on, each under a heat map of its regions, and the text beside it.

import { choice, h, replace } from "./dom.js";
import { count, figure, number, share, visible } from "./format.js";
import { hide, show_tip } from "./tokens.js";

const SIDE = 256; // of what is drawn at most, as of the thumbnails
const HOTTEST = [226, 38, 30];
const COLDEST = [255, 205, 60];
const KINDS = { image: "Regions of images", text: "Text", assistant: "The assistant" };
const remembered = { scale: "shared", look: "cells" };

/** The pictures of `latent`, or nothing where there are none to be had. */
export function picturesPanel(source, latent) {
  if (!latent.pictures) return null;
  const { shown, kinds } = latent.pictures;
  const fired = latent.numbers.fired || 1;
  const largest = Math.max(...shown.map(({ value }) => value), 0) || 1;
  const list = h("ol.pictures");
  const draw = () => {
    hide();
    replace(list, shown.map((one) => card(source, one, remembered.scale === "own" ? one.value || 1 : largest)));
  };
  const pickScale = choice("Scale of the heat maps",
    [["shared", "one scale", "the hottest colour is the strongest region of all pictures"],
      ["own", "own scale", "the hottest colour is each picture's strongest region"]], remembered.scale,
    (scale) => { remembered.scale = scale; draw(); });
  const pickLook = choice("Heat map",
    [["cells", "cells", "each region as it is"], ["smooth", "smooth", "between the middles of the regions, bilinear"],
      ["off", "off", "the picture alone"]], remembered.look, (look) => { remembered.look = look; draw(); });
  draw();
  return h("section.panel.wide", {},
    h("div.head", {}, h("h2", {}, "Images"), h("span.grow"), pickScale, pickLook),
    h("p.caption", {}, kinds.map(([kind, hits, tokens], place) => [place ? " · " : "",
      `${KINDS[kind]}: ${share(hits / fired)} of its firing`,
      h("span.dim", {}, ` (${share(tokens ? hits / tokens : 0)} of ${count(tokens)} tokens)`)])),
    shown.length ? list : h("p.caption", {}, "It fires on no region of an image."));
}

/** One picture: its heat map, its strongest value, the text around it, where it is from. */
function card(source, one, scale) {
  const canvas = heat(one, scale, remembered.look);
  const image = h("img", { alt: described(one), width: canvas.width, height: canvas.height,
    class: remembered.look === "off" ? null : "under" });
  source.picture(one.thumbnail).then((address) => { image.src = address; })
    .catch((error) => image.replaceWith(h("span.error", {}, error.message)));
  const frame = h("div.picture", { onmousemove: (event) => tell(event, one, frame), onmouseleave: hide },
    image, canvas);
  const from = [`context ${count(one.context)}`, one.others && `and ${count(one.others)} more with this image`];
  return h("li", { "--v": Math.min(1, one.value / scale).toFixed(3) }, frame,
    h("div.beside", {},
      h("p", {}, h("b.num", {}, figure(one.value)), h("span.dim", {}, ` · ${count(one.cells.length)} regions`)),
      h("p.around", {}, h("span", {}, visible(one.before)), h("span.here", { "aria-label": "the picture" }, "▦"),
        h("span", {}, visible(one.after))),
      h("p.from", {}, from.filter(Boolean).join(" "),
        source.meta.box && [" · ", h("a", { href: `#/image/${one.context}?sha256=${one.sha256}` }, "draw a box")])));
}

function described(one) {
  const top = one.a.indexOf(Math.max(...one.a));
  const [grid, row, col] = one.cells[top];
  const [rows, cols] = one.grids[grid];
  return `Picture of context ${one.context}: the latent fires on ${one.cells.length} regions, most at row ${row + 1} of `
    + `${rows}, column ${col + 1} of ${cols}, with ${number(one.a[top])}`;
}

/** Activations by cell, a Float32Array for each grid. */
export function tables(one) {
  const found = one.grids.map(([rows, cols]) => new Float32Array(rows * cols));
  one.cells.forEach(([grid, row, col], place) => {
    const at = row * one.grids[grid][1] + col;
    found[grid][at] = Math.max(found[grid][at], one.a[place]);
  });
  return found;
}

/** The activation at a place of the image in pixels, the largest of all grids there; `look` is cells or smooth. */
export function valueAt(one, held, x, y, look) {
  let most = 0;
  one.grids.forEach(([rows, cols, left, top, dx, dy], grid) => {
    const [c, r] = [(x - left) / dx, (y - top) / dy];
    if (c < 0 || r < 0 || c >= cols || r >= rows) return;
    const at = (row, col) => held[grid][Math.max(0, Math.min(rows - 1, row)) * cols
      + Math.max(0, Math.min(cols - 1, col))];
    let value = at(Math.floor(r), Math.floor(c));
    if (look === "smooth") {
      const [r0, c0] = [Math.floor(r - 0.5), Math.floor(c - 0.5)];
      const [u, v] = [r - 0.5 - r0, c - 0.5 - c0];
      value = (1 - u) * ((1 - v) * at(r0, c0) + v * at(r0, c0 + 1))
        + u * ((1 - v) * at(r0 + 1, c0) + v * at(r0 + 1, c0 + 1));
    }
    most = Math.max(most, value);
  });
  return most;
}

/** A canvas of the picture's shape with the heat of every pixel; `scale` is the value of the hottest colour. */
function heat(one, scale, look) {
  const zoom = SIDE / Math.max(one.width, one.height);
  const [width, height] = [one.width, one.height].map((side) => Math.max(1, Math.round(side * zoom)));
  const canvas = h("canvas", { width, height, "aria-hidden": "true" });
  if (look === "off") return canvas;
  const pen = canvas.getContext("2d");
  const pixels = pen.createImageData(width, height);
  const held = tables(one);
  for (let at = 0, y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, at += 4) {
      const strength = Math.min(1, valueAt(one, held, (x + 0.5) / zoom, (y + 0.5) / zoom, look) / scale);
      if (strength <= 0) continue;
      for (let channel = 0; channel < 3; channel += 1) {
        pixels.data[at + channel] = COLDEST[channel] + strength * (HOTTEST[channel] - COLDEST[channel]);
      }
      pixels.data[at + 3] = 255 * (0.12 + 0.6 * strength);
    }
  }
  pen.putImageData(pixels, 0, 0);
  return canvas;
}

/** Say the value of the region under the pointer. */
function tell(event, one, frame) {
  const box = frame.getBoundingClientRect();
  const [x, y] = [(event.clientX - box.left) / box.width * one.width, (event.clientY - box.top) / box.height * one.height];
  show_tip(frame, [h("span.value", {}, figure(valueAt(one, tables(one), x, y, "cells"))),
    h("span.dim", {}, ` · ${Math.round(x)}, ${Math.round(y)} px`)]);
}
