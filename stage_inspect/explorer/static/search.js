// A search for a concept's latents: what is asked, how far it is, and its end.

import { h, replace } from "./dom.js";
import { count } from "./format.js";

const WAIT = 400; // milliseconds between two looks
const KINDS = {
  regex: ["Regular expression", "self\\.\\w+",
    "As Python reads it, over the text of a document: a token counts where it shares a character with a match."],
  token: ["Token", "def", "The text of a single token as the vocabulary has it, spaces too."],
  python: ["Python", "", "From Python's own tokenizer, on documents that are Python source."],
};
const SPLITS = { heldout: "held out", train: "training", all: "all" };
const remembered = { kind: "regex", texts: { regex: "", token: "", python: "all" }, split: "heldout", contexts: "" };

/** {content, leave, shown}: a form that starts a search; `found` gets the names of the concepts that have results. */
export function searchPanel(source, found) {
  const { find } = source.meta;
  let timer = 0;
  let left = false;
  let wasRunning = false;
  const told = h("p.caption", { role: "status" });
  const bar = h("progress", { "aria-label": "Tokens read", max: "1" });
  const far = h("span.dim.num");
  const start = h("button.primary", {}, "Search");
  const cancel = h("button", { type: "button", onclick: () => telling(() => source.ask("find/cancel", {})) }, "Cancel");
  const running = h("div.row.running", { hidden: true }, bar, far, cancel);
  const hint = h("p.caption", { id: "concept-hint" });
  const field = h("div.asked");
  const kind = h("select", { onchange: () => { remembered.kind = kind.value; draw(); } },
    Object.entries(KINDS).map(([value, [name]]) => h("option", { value }, name)));
  const split = h("select", { onchange: () => { remembered.split = split.value; } },
    find.splits.map((value) => h("option", { value }, SPLITS[value] ?? value)));
  const contexts = h("input", { type: "number", min: "2", placeholder: "all", value: remembered.contexts,
    oninput: () => { remembered.contexts = contexts.value; } });
  kind.value = remembered.kind;
  split.value = remembered.split;

  /** What is looked for: a name of Python's out of a list, else one concept on each line. */
  function draw() {
    const [name, placeholder, about] = KINDS[remembered.kind];
    const common = { "aria-describedby": "concept-hint", required: true,
      oninput: (event) => { remembered.texts[remembered.kind] = event.target.value; } };
    const what = remembered.kind === "python"
      ? h("select", common, h("option", { value: "all" }, "all of them"),
        Object.entries(find.python).map(([value, definition]) => h("option", { value }, `${value}: ${definition}`)))
      : h("textarea", { ...common, rows: "1", placeholder, maxlength: String(find.concepts * (find.characters + 1)),
        spellcheck: "false", autocapitalize: "off",
        onkeydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && begin(event) });
    what.value = remembered.texts[remembered.kind];
    const label = remembered.kind === "python" ? "Concept" : `${name}, one on each line`;
    replace(field, h("label", {}, h("span", {}, label), what));
    replace(hint, about);
  }

  async function begin(event) {
    event.preventDefault();
    const text = remembered.texts[remembered.kind];
    const concepts = remembered.kind === "python" ? [text] : text.split("\n").filter((line) => line !== "");
    const body = { [remembered.kind]: concepts, split: split.value };
    if (contexts.value) body.contexts = Number(contexts.value);
    await telling(() => source.ask("find", body));
    if (!running.hidden) cancel.focus();
  }

  /** Show what the server answers; an error is its sentence. */
  async function telling(ask) {
    try {
      show(await ask());
    } catch (error) {
      replace(told, h("span.error", {}, error.message));
    }
  }

  function show({ state, tokens, total, error, concepts, left_out: absent }) {
    if (left) return;
    clearTimeout(timer);
    const had = running.contains(document.activeElement);
    const isRunning = state === "running";
    running.hidden = !isRunning;
    start.disabled = isRunning;
    if (isRunning) {
      if (!wasRunning) replace(told, "The search is running.");
      if (total) {
        bar.max = total;
        bar.value = tokens;
      } else bar.removeAttribute("value");
      replace(far, total ? `${count(tokens)} of ${count(total)} tokens` : "opening the store …");
      timer = setTimeout(() => telling(() => source.ask("find")), WAIT);
    } else if (state === "failed") {
      replace(told, h("span.error", {}, error));
    } else if (state === "cancelled") {
      replace(told, "The search was cancelled.");
    } else if (state === "done") {
      replace(told, `Found: ${concepts.join(", ")}.`,
        Object.entries(absent).map(([name, why]) => h("span.error", {}, ` Left out: ${name}, ${why}.`)));
      if (wasRunning) found(concepts).catch((problem) => replace(told, h("span.error", {}, problem.message)));
    }
    if (had && !isRunning) start.focus();
    wasRunning = isRunning;
  }

  draw();
  return {
    content: h("form.panel.search", { onsubmit: begin, "aria-label": "Search for a concept" },
      h("h2", {}, "Search for a concept"),
      h("div.fields", {}, h("label", {}, h("span", {}, "Kind"), kind), field,
        h("label", {}, h("span", {}, "Tokens"), split), h("label", {}, h("span", {}, "Contexts at most"), contexts),
        h("div.row", {}, start)),
      hint, running, told),
    shown: () => telling(() => source.ask("find")),
    leave: () => { left = true; clearTimeout(timer); },
  };
}
