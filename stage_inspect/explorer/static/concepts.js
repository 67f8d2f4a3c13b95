// The latents of a concept: how well each tells the tokens that are examples of it.

import { h } from "./dom.js";
import { figure } from "./format.js";
import { latentLink } from "./latent.js";

/** The page. */
export async function conceptsPage(source) {
  const concepts = await source.concepts();
  return {
    title: "Concepts",
    content: [
      h("div.title", {}, h("div", {}, h("h1", {}, "Concepts"),
        h("p.lead", {}, "The latents that tell a concept best, by F1 at their best threshold, with its 95 % interval over "
          + "groups of documents. granary inspect find adds to them."))),
      h("div.columns.concepts", {}, concepts.map((concept) => panelOf(source, concept))),
    ],
  };
}

function panelOf(source, { name, definition, split, latents }) {
  const head = ["Latent", "F1", "precision", "recall", "AUROC"];
  const rows = latents.map(([latent, named, tokens, f1, low, high, precision, recall, auroc]) => h("tr", {},
    h("th", { scope: "row" }, latentLink(source, latent, named, tokens)),
    h("td", { title: `${figure(low)} to ${figure(high)}` },
      h("span.meter", { "--w": f1.toFixed(3), "aria-hidden": "true" }), figure(f1),
      h("small", {}, ` ${figure(low, 2)}–${figure(high, 2)}`)),
    [precision, recall, auroc].map((score) => h("td", {}, figure(score)))));
  return h("section.panel", {},
    h("h2", {}, name, split && h("span.dim", {}, ` · ${split}`)),
    definition && definition !== name && h("p.caption.definition", {}, definition),
    latents.length ? h("table.plain-table", {},
      h("thead", {}, h("tr", {}, head.map((title) => h("th", { scope: "col" }, title)))), h("tbody", {}, rows))
      : h("p.caption", {}, "No latent was found."));
}
