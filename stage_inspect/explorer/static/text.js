// Which latents fire on a text of one's own: the model and the dictionary run as it is typed.

import { afterwards, choice, h, replace } from "./dom.js";
import { count, figure, number } from "./format.js";
import { chip, hide, tokenLine } from "./tokens.js";

const SHOWN = 40;
const EXAMPLE = `def read(self, path):
    """Return the text of a file."""
    with open(path) as file:
        return file.read()
`;
const SORTS = [
  ["max", "maximum", "by the largest value in the text"],
  ["sum", "sum", "by the sum of values over the text"],
  ["rare", "rarity", "by the largest value, times how rare the latent is: ln(1 / density)"],
];
const remembered = { text: EXAMPLE, sort: "rare", chosen: null };

/** The page. */
export async function textPage(source) {
  const density = await source.column("density");
  const told = h("p.caption", { role: "status" });
  const reading = h("section.panel.reading-text.laid-out");
  const list = h("ol.found", { "aria-label": "Latents that fire" });
  const box = h("textarea",
    { rows: "7", "aria-label": "Text", spellcheck: "false", maxlength: String(source.meta.live.characters) });
  box.value = remembered.text;
  let answer = null;
  let running = null;

  const run = async () => {
    remembered.text = box.value;
    running?.abort();
    const mine = (running = new AbortController());
    replace(told, "Reading …");
    try {
      const found = await source.ask("text", { text: box.value }, mine.signal);
      if (running !== mine) return;
      answer = found;
      draw();
    } catch (error) {
      if (error.name !== "AbortError") replace(told, h("span.error", {}, error.message));
    }
  };
  const later = afterwards(run, 250);
  box.addEventListener("input", later);

  const weight = ({ latent, max, sum }) => ({ max, sum,
      rare: max * Math.log(1 / Math.max(density[latent], 1e-9)) })[remembered.sort];

  function draw() {
    hide();
    const token = remembered.chosen?.token;
    const here = token === undefined ? answer.latents : answer.latents.filter(({ at }) => at.includes(token));
    const sorted = [...here].sort((one, other) => weight(other) - weight(one)).slice(0, SHOWN);
    if (!answer.latents.some(({ latent }) => latent === remembered.chosen?.latent)
        && token === undefined) remembered.chosen = null;
    const chosen = answer.latents.find(({ latent }) => latent === remembered.chosen?.latent) ?? sorted[0];
    replace(told, `${count(answer.pieces.length)} tokens, ${count(answer.latents.length)} latents fire`,
      answer.cut ? "; the text was cut" : "",
      token === undefined ? "" : [" · on token ", h("code", {}, answer.pieces[token]), " ",
        h("button.plain.link", { type: "button", onclick: () => { remembered.chosen = null; draw(); } },
          "all tokens")]);
    const line = chosen && tokenLine({ ...answer, at: chosen.at, a: chosen.a, peak: chosen.peak, start: 0 }, chosen.max,
      `The text, coloured by latent ${chosen.latent}`);
    line?.addEventListener("click", (event) => {
      const span = event.target.closest(".t");
      if (!span) return;
      remembered.chosen = { token: span.first };
      draw();
    });
    replace(reading, line && [h("p.kicker", {}, `Coloured by latent ${chosen.latent}`), line,
        h("p.caption", {}, "A click on a token lists the latents that fire on it.")]);
    replace(list, sorted.map((found) => item(found, found === chosen)));
    name(sorted);
  }

  function item({ latent, max, sum, at }, chosen) {
    const pick = () => { remembered.chosen = { ...remembered.chosen,
        latent }; draw(); list.querySelector('[aria-pressed="true"]')?.focus({ preventScroll: true }); };
    return h("li", { "data-latent": latent, class: chosen ? "chosen" : null },
      h("button.plain", { type: "button", "aria-pressed": String(chosen), onclick: pick,
          title: "Colour the text by it" }, h("b", {}, String(latent)), h("span.named")),
      h("span.num.dim", { title: `sum ${number(sum)} over ${at.length} tokens` }, figure(max)),
      h("a", { href: `#/latent/${latent}`, "aria-label": `Open latent ${latent}` }, "open"));
  }

  function name(sorted) {
    for (const { latent } of sorted) {
      source.rows(Math.floor(latent / source.meta.block)).then((rows) => {
        const [told, tokens] = rows[String(latent)] ?? [null, []];
        const place = list.querySelector(`[data-latent="${latent}"] .named`);
        if (place) replace(place, told ?? tokens.slice(0, 5).map((token) => [chip(token), " "]));
      }).catch(() => {});
    }
  }

  return {
    title: "Text",
    content: [
      h("div.title", {}, h("div", {}, h("h1", {}, "What fires on a text"),
          h("p.lead", {}, "The model reads the text as you type, and the dictionary says which of its latents fire."))),
      h("div.text-page", {},
        h("div.stack", {}, h("section.panel", {}, h("h2", {}, "Text"), box, told), reading),
        h("section.panel", {},
          h("div.head", {}, h("h2", {}, "Latents"), h("span.grow"),
            choice("Order", SORTS, remembered.sort, (sort) => { remembered.sort = sort; if (answer) draw(); })), list)),
    ],
    shown: run,
    leave: () => running?.abort(),
  };
}
