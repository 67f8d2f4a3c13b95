// The directions of all latents in two dimensions.

import { afterwards, h, replace } from "./dom.js";
import { count, share } from "./format.js";
import { scatter } from "./scatter.js";

const ABOUT = "The directions of the decoder, laid flat along the two in which they differ most. Those that lie close "
  + "together here may still differ in the others.";

/** The page. */
export async function mapPage(source) {
  const [x, y, density] = await Promise.all(["map_x", "map_y", "density"].map((name) => source.column(name)));
  const indices = (source.meta.only ?? [...x.keys()]).filter((index) => density[index] > 0);
  const told = h("p.caption", { role: "status" }, "A point is a latent that fires; it opens its page.");
  const place = h("div");
  const draw = (marked) => replace(place, scatter({
    label: "Map of the latents", indices, x, y, marked, ratio: 0.62,
      tell: (index) => `latent ${index}: ${share(density[index])}`,
  }));
  const find = afterwards(async (words) => {
    if (!words.trim()) return draw([]);
    const found = await source.search(words.trim()).catch((error) => ({ latents: [], error: error.message }));
    replace(told, found.error ?? `${count(found.latents.length)} latents are marked`);
    draw(found.latents);
  }, 250);
  draw([]);
  return {
    title: "Map",
    content: [
      h("div.title", {}, h("div", {}, h("h1", {}, "Map"),
          h("p.lead", {}, ABOUT)),
        h("div.actions", {}, h("label", {},
            h("input", { type: "search", placeholder: "mark words or tokens", "aria-label": "Mark latents by words",
                oninput: (event) => find(event.target.value) })))),
      h("section.panel", {}, place, told),
    ],
  };
}
