// The latents of a concept: how well each tells the tokens that are examples of it.

import { h, replace } from "./dom.js";
import { figure } from "./format.js";
import { latentLink } from "./latent.js";
import { searchPanel } from "./search.js";

/** The page. */
export async function conceptsPage(source) {
  const panels = h("div.columns.concepts");
  const draw = async (first) => {
    const concepts = await source.concepts();
    const isFirst = ({ name }) => first.includes(name);
    const ordered = [...concepts.filter(isFirst), ...concepts.filter((concept) => !isFirst(concept))];
    replace(panels, ordered.map((concept) => panelOf(source, concept)));
  };
  await draw([]);
  const search = source.meta.find && searchPanel(source, draw);
  return {
    title: "Concepts",
    content: [
      h("div.title", {}, h("div", {}, h("h1", {}, "Concepts"),
        h("p.lead", {}, "The latents that tell a concept best, by F1 at their best threshold. Latent and threshold were chosen on "
          + "some documents (F1 chosen) and all other scores are those of others, with 95 % intervals over documents. "
          + `${search ? "A search here, or granary inspect find," : "granary inspect find"} adds to them.`))),
      search?.content,
      panels,
    ],
    shown: search?.shown,
    leave: search?.leave,
  };
}

function panelOf(source, { name, definition, split, latents }) {
  const head = ["Latent", "F1", "F1 chosen", "precision", "recall", "AUROC"];
  const rows = latents.map(([latent, named, tokens, f1, low, high, precision, recall, auroc, aurocLow, aurocHigh,
    chosenF1]) => h("tr", {},
    h("th", { scope: "row" }, latentLink(source, latent, named, tokens)),
    scored(f1, low, high, h("span.meter", { "--w": f1.toFixed(3), "aria-hidden": "true" })),
    [chosenF1, precision, recall].map((score) => h("td", {}, figure(score))),
    scored(auroc, aurocLow, aurocHigh)));
  return h("section.panel", {},
    h("h2", {}, name, split && h("span.dim", {}, ` · ${split}`)),
    definition && definition !== name && h("p.caption.definition", {}, definition),
    latents.length ? h("table.plain-table", {},
      h("thead", {}, h("tr", {}, head.map((title) => h("th", { scope: "col" }, title)))), h("tbody", {}, rows))
      : h("p.caption", {}, "No latent was found."));
}

function scored(score, low, high, meter = null) {
  const told = typeof low === "number";
  return h("td", told ? { title: `${figure(low)} to ${figure(high)}` } : {}, meter, figure(score),
    told && h("small", {}, ` ${figure(low, 2)}–${figure(high, 2)}`));
}
