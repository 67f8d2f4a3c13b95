// What a latent is said to do: each explanation with its scores, their controls, and the examples where it failed.

import { h, replace } from "./dom.js";
import { figure, number } from "./format.js";
import { tokenLine } from "./tokens.js";

const CONTROLS = { shuffled: "another latent's", empty: "none at all" };

/** All explanations of a latent; with a server people add theirs and change them. */
export function explainedPanel(source, latent) {
  const { explanations } = latent;
  if (!explanations.length && !source.meta.writable) return null;
  return h("section.panel.wide.explained", {}, h("h2", {}, "Explanations"),
    explanations.length > 0 && h("ul.told", {}, explanations.map((said) => one(source, latent, said))),
    source.meta.writable && edited(source, latent, null, "Add an explanation"));
}

function one(source, latent, said) {
  const { text, author, method, scores } = said;
  return h("li", {}, h("p.said", {}, text), h("p.dim", {}, [author, method].filter(Boolean).join(" · ")),
    scores.map((score) => scored(score, latent)),
    source.meta.writable && edited(source, latent, said, "Edit"));
}

function scored(score, latent) {
  const failed = [...new Set(score.failed.map(({ rank }) => rank ?? "example"))];
  return h("div.score", {}, h("dl.numbers", {},
    fact(score.scorer.replaceAll("_", " "), score),
    score.controls.map(([name, control]) => fact(`control: ${CONTROLS[name] ?? name}`, control)),
    score.facts.map(([name, value]) => fact(name, { value, low: null, high: null }))),
  score.why && h("p.caption", {}, score.why),
  failed.length > 0 && h("details", {}, h("summary", {}, `Where it failed: ${score.failed.length} examples`),
    failed.map((kind) => [h("h3", {}, kind),
      h("ol.examples", {}, score.failed.filter(({ rank }) => (rank ?? "example") === kind)
        .map((example, place) => failure(example, latent, `${kind} ${place + 1}`)))])));
}

function fact(name, { value, low, high }) {
  return h("div", {}, h("dt", {}, name), h("dd", {}, value === null ? "failed" : number(value),
    low !== null && h("small", {}, `${number(low, 2)} to ${number(high, 2)}`)));
}

function failure(example, latent, told) {
  const largest = latent.numbers.max || 1;
  return h("li", { "--v": Math.min(1, example.value / largest).toFixed(3) },
    h("span.peak-value", {}, example.value ? figure(example.value) : "–"),
    tokenLine(example, largest, told), h("span.from", {}, `context ${example.context}`));
}

/** A form to add an explanation, or to change one; a changed one of someone else is kept beside the change. */
function edited(source, latent, said, title) {
  const index = latent.latent;
  const told = h("span.dim", { role: "status" });
  const text = h("textarea", { rows: "2", "aria-label": title, maxlength: "2000" }, said?.text ?? "");
  const save = async (event) => {
    event.preventDefault();
    try {
      await source.ask(`said/${index}`, { id: said?.id ?? null, text: text.value });
      source.forget(`latent/${index}.json`);
      source.forget(`rows/${Math.floor(index / source.meta.block)}.json`);
      window.dispatchEvent(new HashChangeEvent("hashchange"));
    } catch (error) {
      replace(told, error.message);
    }
  };
  return h("details", {}, h("summary", {}, title), h("form.stack", { onsubmit: save }, text,
    h("div.row", {}, h("button", {}, "Save"), told)));
}
