// The frame of all pages: which one is shown, the keys that work everywhere, the box that finds a latent.

import { h, replace } from "./dom.js";
import { open } from "./data.js";
import { hide } from "./tokens.js";
import { latentPage } from "./latent.js";
import { tablePage } from "./table.js";
import { overviewPage } from "./overview.js";
import { textPage } from "./text.js";
import { steerPage } from "./steer.js";
import { comparePage } from "./compare.js";
import { listsPage } from "./lists.js";
import { mapPage } from "./map.js";
import { conceptsPage } from "./concepts.js";
import { imagePage } from "./image.js";
import { helpDialog } from "./help.js";
import { randomLatent } from "./random.js";

const PAGES = [
  { path: "overview", name: "Overview", key: "o", page: overviewPage },
  { path: "latents", name: "Latents", key: "t", page: tablePage },
  { path: "text", name: "Text", key: "x", page: textPage, needs: ["live"] },
  { path: "image", name: "Image", key: "i", page: imagePage, needs: ["box"] },
  { path: "steer", name: "Steer", key: "s", page: steerPage, needs: ["steer"] },
  { path: "compare", name: "Compare", key: "c", page: comparePage },
  { path: "concepts", name: "Concepts", key: "p", page: conceptsPage, needs: ["concepts", "find"] },
  { path: "map", name: "Map", key: "m", page: mapPage, needs: ["map"] },
  { path: "lists", name: "Lists", key: "l", page: listsPage, needs: ["writable"] },
];

const body = document.body;
const view = h("main", { id: "main", tabindex: "-1" });
let source = null;
let help = null;
let leave = null;
let turn = 0;

start();

async function start() {
  try {
    source = await open();
  } catch (error) {
    replace(body, h("main", {}, h("h1", {}, "Nothing to show"), h("p", {}, error.message)));
    return;
  }
  const shown = PAGES.filter(isHere);
  help = helpDialog(shown);
  replace(body,
    h("a.skip", { href: "#main", onclick: (event) => { event.preventDefault(); view.focus(); } },
      "Skip to the content"),
    h("header.bar", {},
      h("a.brand", { href: "#/overview", title: source.meta.title }, h("span.grain", { "aria-hidden": "true" }),
        "Granary", h("small", {}, source.meta.title)),
      h("nav", { "aria-label": "Pages" },
        shown.map(({ path, name }) => h("a", { href: `#/${path}`, "data-path": path }, name))),
      finder()),
    view,
    h("footer.foot", {},
      h("span", {}, [source.meta.model, source.meta.sites.join(", ")].filter(Boolean).join(" · ")),
      h("button.plain", { type: "button", onclick: () => help.showModal() }, "Keys ", h("kbd", {}, "?"))),
    help);
  window.addEventListener("hashchange", show);
  document.addEventListener("keydown", keys);
  await show();
}

/** Whether these pages have something for a page to show or to do. */
function isHere({ needs }) {
  return !needs || needs.some((need) => source.meta[need]);
}

/** Show what the address names: #/page/argument?key=value. */
async function show() {
  const mine = (turn += 1);
  const [path, query = ""] = (location.hash.slice(2) || "overview").split("?");
  const [name, ...rest] = path.split("/");
  const found = PAGES.find((page) => page.path === name && isHere(page));
  const make = name === "latent" ? latentPage : found?.page;
  hide();
  leave?.();
  leave = null;
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.dataset.path === (name === "latent" ? "latents" : name);
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    if (here) link.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  view.setAttribute("aria-busy", "true");
  let page;
  try {
    if (!make) throw new Error("There is no such page.");
    page = await make(source, rest.map(decodeURIComponent), new URLSearchParams(query));
  } catch (error) {
    const back = h("p", {}, h("a", { href: "#/overview" }, "Overview"));
    page = { title: "Not found", content: [h("h1", {}, "Not found"), h("p", {}, error.message), back] };
  }
  if (mine !== turn) return page.leave?.();
  document.title = `${page.title} · ${source.meta.title}`;
  view.className = page.wide ? "wide" : "";
  replace(view, page.content);
  view.removeAttribute("aria-busy");
  if (!page.stay) window.scrollTo(0, 0);
  leave = page.leave ?? null;
  page.shown?.();
}

/** The box in the bar: a number goes to that latent, words to the table. */
function finder() {
  const input = h("input", {
    type: "search", id: "finder", autocomplete: "off", placeholder: "Latent or words",
    "aria-label": "Go to a latent by number, or find one by words",
  });
  return h("form.finder", {
    role: "search",
    onsubmit: (event) => {
      event.preventDefault();
      const wanted = input.value.trim();
      if (!wanted) return;
      const index = Number(wanted);
      location.hash = source.has(index) ? `#/latent/${index}` : `#/latents?q=${encodeURIComponent(wanted)}`;
      input.value = "";
      input.blur();
    },
  }, input, h("kbd", { "aria-hidden": "true" }, "/"));
}

async function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, textarea, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (help.open) return;
  const page = PAGES.find(({ key }) => key === event.key);
  const [, latent] = location.hash.match(/^#\/latent\/(\d+)/) ?? [];
  if (event.key === "/") document.getElementById("finder").focus();
  else if (event.key === "?") help.showModal();
  else if (event.key === "r") location.hash = `#/latent/${await randomLatent(source)}`;
  else if (page) document.querySelector(`nav a[data-path="${page.path}"]`)?.click();
  else if (latent && (event.key === "j" || event.key === "ArrowRight")) document.getElementById("next")?.click();
  else if (latent && (event.key === "k" || event.key === "ArrowLeft")) document.getElementById("previous")?.click();
  else return;
  event.preventDefault();
}
