// Lists of latents that a reader keeps.

import { h, replace } from "./dom.js";
import { count } from "./format.js";
import { STARRED } from "./notes.js";
import { chip } from "./tokens.js";

/** The page. */
export async function listsPage(source) {
  const { lists } = await source.ask("lists");
  const told = h("span.dim", { role: "status" });
  const change = async (body) => {
    try {
      await source.ask("lists", body);
      window.dispatchEvent(new HashChangeEvent("hashchange"));
    } catch (error) {
      replace(told, error.message);
    }
  };
  const add = (event) => {
    event.preventDefault();
    const [list, latent] = new FormData(event.target).values();
    change({ list: list.trim(), latent: Number(latent), on: true });
  };
  const names = Object.keys(lists);
  return {
    title: "Lists",
    stay: true,
    content: [
      h("div.title", {}, h("div", {}, h("h1", {}, "Lists"),
          h("p.lead", {}, "Latents to come back to. They are kept in the latents folder, beside the notes.")),
        h("form.row.actions", { onsubmit: add },
          h("label", {}, h("span", {}, "List"),
            h("input", { name: "list", value: STARRED, required: true, maxlength: "80", list: "list-names" }),
              h("datalist", { id: "list-names" }, names.map((name) => h("option", { value: name })))),
          h("label", {}, h("span", {}, "Latent"),
            h("input", { name: "latent", type: "number", min: "0", max: String(source.meta.d_latent - 1),
                required: true })),
          h("button", {}, "Add"), told)),
      names.length ? null : h("p.remark", {}, "No list yet: star a latent on its page, or add one here."),
      h("div.stack", {}, names.map((name) => list(source, name, lists[name], change))),
    ],
  };
}

function list(source, name, latents, change) {
  const rows = latents.map((latent) => {
    const told = h("span.names");
    source.rows(Math.floor(latent / source.meta.block)).then((found) => {
      const [named, tokens] = found[String(latent)] ?? [null, []];
      replace(told, named && h("span", {}, named, " "), tokens.map((token) => [chip(token), " "]));
    }).catch(() => {});
    return h("li", {}, h("a", { href: `#/latent/${latent}` }, h("b", {}, String(latent))), told,
      h("button.plain", { type: "button", "aria-label": `Take ${latent} off ${name}`,
          onclick: () => change({ list: name, latent, on: false }) }, "✕"));
  });
  return h("section.panel", {}, h("h2", {}, name, h("span.dim", {}, ` · ${count(latents.length)}`)),
    h("ol.kept", {}, rows));
}
