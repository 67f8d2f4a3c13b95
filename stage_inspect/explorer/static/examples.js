// Examples of a latent: the strongest, by rank, and texts on which it is silent.

import { choice, h, replace } from "./dom.js";
import { count, figure, number } from "./format.js";
import { hide, tokenLine } from "./tokens.js";

const FIRST = 20;
const remembered = { group: "top", scale: "shared", lines: "flowing" };

/** All examples of `latent`, one group at a time. */
export function examplesPanel(source, latent) {
  const list = h("ol.examples");
  const told = h("p.caption");
  const groups = new Map(latent.groups.map((group) => [group.name, group]));
  let group = groups.get(remembered.group) ?? latent.groups[0];
  let all = false;

  function draw() {
    hide();
    const shown = all ? group.examples : group.examples.slice(0, FIRST);
    const largest = latent.numbers.max || 1;
    list.classList.toggle("laid-out", remembered.lines === "lines");
    replace(list, shown.map((example, rank) => row(example, rank,
          remembered.scale === "own" ? example.value || 1 : largest)));
    const more = group.total - shown.length;
    if (more > 0 && (shown.length < group.examples.length || !source.meta.chunk)) list.append(h("li.more", {},
        h("button", { type: "button", onclick: showAll }, `Show ${count(more)} more`)));
    replace(told, group.note);
  }

  async function showAll() {
    const from = group;
    if (from.total > from.examples.length) from.examples.push(...await source.more(latent.latent));
    from.total = from.examples.length;
    all = true;
    if (from === group) draw();
  }

  const pickGroup = choice("Examples", latent.groups.map(({ name, title }) => [name, title]), group.name, (name) => {
    remembered.group = name;
    group = groups.get(name);
    all = false;
    draw();
  });
  const pickScale = choice("Colour scale",
    [["shared", "one scale", "full colour is the latent's maximum"],
      ["own", "own scale", "full colour is each example's maximum"]], remembered.scale,
        (scale) => { remembered.scale = scale; draw(); });
  const pickLines = choice("Line breaks", [["flowing", "flowing"], ["lines", "lines"]], remembered.lines,
    (lines) => { remembered.lines = lines; draw(); });
  draw();
  return h("section.panel.wide", {},
    h("div.head", {}, h("h2", {}, "Examples"), pickGroup, h("span.grow"), pickScale, pickLines), told, list);
}

/** One example: its value, its text, where it is from. */
function row(example, rank, scale) {
  const peak = example.pieces[example.peak];
  const what = example.value ? `maximum ${number(example.value)} at ${JSON.stringify(peak ?? "")}` : "silent";
  const told = `Example ${rank + 1}, ${what}`;
  const from = [`context ${count(example.context)}, token ${count(example.start + example.peak)}`,
    example.rank].filter(Boolean);
  return h("li", { "--v": Math.min(1, example.value / scale).toFixed(3) },
    h("span.peak-value", {}, example.value ? figure(example.value) : "–"),
    tokenLine(example, scale, told),
    h("span.from", {}, from.join(" · ")));
}
