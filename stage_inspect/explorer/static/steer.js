// The model's continuation of a prompt with one latent changed, beside the one without.

import { choice, h, replace } from "./dom.js";
import { figure, number, quoted } from "./format.js";
import { latentLink } from "./latent.js";

const MODES = [
  ["set", "set", "the latent has this value on every token"],
  ["add", "add", "this is added to the latent on every token"],
  ["multiply", "scale", "the latent's own value times this; nothing where it is silent"],
];
const ABOUT = "One latent is changed while the model writes. The part of the activation that the dictionary does not "
  + "explain is kept, so that nothing else changes.";
const remembered = { prompt: "def read(self, path):\n    ", mode: "set", factor: 1.5, tokens: 40 };

/** The page. */
export async function steerPage(source, _, query) {
  const max = await source.column("max");
  let index = Number(query.get("latent") ?? [...max.keys()].find((row) => max[row] > 0) ?? 0);
  const prompt = h("textarea", { rows: "4", spellcheck: "false", maxlength: String(source.meta.live.characters) });
  prompt.value = remembered.prompt;
  const which = h("input",
    { type: "number", min: "0", max: String(source.meta.d_latent - 1), value: String(index), required: true });
  const strength = h("input", { type: "number", step: "any", required: true });
  const slider = h("input", { type: "range", min: "-2", max: "4", step: "0.1", value: String(remembered.factor) });
  const length = h("input",
    { type: "number", min: "1", max: String(source.meta.live.generated), value: String(remembered.tokens),
      required: true });
  const told = h("span.dim", { role: "status" });
  const about = h("p.caption");
  const out = h("div.stack.results");
  const start = h("button.primary", {}, "Run");

  const scaled = () => { strength.value = remembered.mode === "multiply" ? slider.value
      : String(Number((Number(slider.value) * (max[index] || 1)).toPrecision(3))); };
  const describe = async () => {
    const row = source.has(index) ? (await source.rows(Math.floor(index / source.meta.block)))[String(index)] : null;
    const [name, tokens] = row ?? [null, []];
    replace(about, latentLink(source, index, name),
      tokens.length ? ` · fires on ${tokens.slice(0, 6).map(quoted).join("  ")}` : "",
        ` · maximum ${number(max[index])}`);
  };
  which.addEventListener("input", () => { index = Number(which.value); scaled(); describe().catch(() => {}); });
  slider.addEventListener("input", () => { remembered.factor = Number(slider.value); scaled(); });
  scaled();

  const run = async (event) => {
    event?.preventDefault();
    Object.assign(remembered, { prompt: prompt.value, tokens: Number(length.value) });
    start.disabled = true;
    replace(told, "The model writes …");
    try {
      show(await source.ask("steer",
          { prompt: prompt.value, latent: index, mode: remembered.mode, strength: Number(strength.value),
            tokens: Number(length.value) }));
      replace(told, "");
    } catch (error) {
      replace(told, h("span.error", {}, error.message));
    }
    start.disabled = false;
  };

  function show({ prompt: begun, clean, steered, next }) {
    const pane = (title, text, other) => h("section.panel", {}, h("h2", {}, title),
      h("p.output", {}, h("span.prompt", {}, begun), compared(text, other)));
    replace(out,
      h("div.two", {}, pane("Unchanged", clean, null),
        pane(`Latent ${index}, ${remembered.mode} ${strength.value}`, steered, clean)),
      h("section.panel", {}, h("h2", {}, "The next token"), probabilities(next)));
  }

  return {
    title: "Steer",
    content: [
      h("div.title", {}, h("div", {}, h("h1", {}, "Steer"),
          h("p.lead", {}, ABOUT))),
      h("form.panel", { onsubmit: run,
          onkeydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && run(event) },
        h("label", {}, h("span", {}, "Prompt"), prompt),
        h("div.fields", {},
          h("label", {}, h("span", {}, "Latent"), which),
          h("div", {}, h("span.label", {}, "Edit"),
            choice("What happens to it", MODES, remembered.mode, (mode) => { remembered.mode = mode; scaled(); })),
          h("label", {}, h("span", {}, "Strength"), strength),
          h("label", {}, h("span", {}, "Times its maximum"), slider),
          h("label", {}, h("span", {}, "Tokens to write"), length),
          h("div.row", {}, start, told)),
        about),
      out,
    ],
    shown: () => describe().catch(() => {}),
  };
}

/** The text, marked from where it leaves the other. */
function compared(text, other) {
  if (other === null) return text;
  let same = 0;
  while (same < text.length && text[same] === other[same]) same += 1;
  return [text.slice(0, same), h("span.changed", {}, text.slice(same))];
}

function probabilities(rows) {
  return h("table.plain-table", {},
    h("thead", {}, h("tr", {},
        ["Token", "unchanged", "steered", "nats"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, rows.map(([token, before, after]) => h("tr", {},
      h("th", { scope: "row" }, h("code.chip", {}, quoted(token))),
      [before, after].map((p) => h("td", { "--w": p.toFixed(4) }, `${figure(100 * p)} %`)),
      h("td", {}, `${after > before ? "+" : "−"}${figure(Math.abs(Math.log(after / before)))}`)))));
}
