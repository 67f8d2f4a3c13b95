// The list of keys.

import { h } from "./dom.js";

const EVERYWHERE = [
  ["/", "find a latent by number or words"],
  ["r", "a latent by chance"],
  ["?", "this list"],
];
const LATENT = [
  ["j or →", "next latent"],
  ["k or ←", "previous latent"],
  ["Tab", "from one example to the next"],
  ["← → within an example", "token by token, each with its value"],
];

/** A dialog; `showModal` opens it. */
export function helpDialog(pages) {
  const section = (title, keys) => [h("h3", {}, title),
    h("dl.keys", {}, keys.map(([key, told]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, told))))];
  const dialog = h("dialog.help", { "aria-label": "Keys" },
    h("h2", {}, "Keys"), section("Everywhere", EVERYWHERE), section("Pages", pages.map(({ key, name }) => [key, name])),
      section("On a latent", LATENT),
    h("form", { method: "dialog" }, h("button", {}, "Close")));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  return dialog;
}
