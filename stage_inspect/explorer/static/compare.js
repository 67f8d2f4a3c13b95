// Two latents side by side, of one dictionary or of two.

import { h } from "./dom.js";
import { count, figure, number, share } from "./format.js";
import { barList, histogram } from "./chart.js";
import { chip, tokenLine } from "./tokens.js";
import { latentLink, panel } from "./latent.js";
import { beside, randomLatent } from "./random.js";

const EXAMPLES = 10;

/** The page of two latents; "2:17" is latent 17 of the second further dictionary that is served. */
export async function comparePage(source, [first, second]) {
  if (first === undefined || second === undefined) {
    const one = first ?? String(await randomLatent(source));
    const own = await source.latent(Number(one));
    const near = own.neighbours.find(([index]) => source.has(index))?.[0] ?? beside(source, Number(one),
      1) ?? Number(one);
    location.replace(`#/compare/${one}/${near}`);
    return { title: "Compare", content: [] };
  }
  const sides = await Promise.all([first, second].map((written) => side(source, written)));
  const go = (event) => {
    event.preventDefault();
    const [one, other] = new FormData(event.target).values();
    location.hash = `#/compare/${one.trim()}/${other.trim()}`;
  };
  const input = (name, value, label) => h("label", {}, h("span", {}, label),
    h("input", { name, value, required: true, pattern: "(\\d+:)?\\d+" }));
  return {
    title: `Latents ${first} and ${second}`,
    content: [
      h("div.title", {}, h("div", {}, h("h1", {}, "Compare"), h("p.lead", {}, relation(sides))),
        h("form.row.actions", { onsubmit: go }, input("one", first, "Latent"), input("other", second, "with"),
          h("button", {}, "Compare"))),
      siblings(source),
      h("div.two", {}, sides.map(({ source: own, latent, link }) => column(own, latent, link))),
    ],
  };
}

async function side(source, written) {
  const [, sibling, number] = written.match(/^(?:(\d+):)?(\d+)$/) ?? [];
  if (number === undefined) throw new Error(`${written} is not a latent: give its number.`);
  const own = sibling === undefined ? source : await source.sibling(Number(sibling));
  if (!own.has(Number(number))) throw new Error(`There is no latent ${written} here.`);
  return { source: own, latent: await own.latent(Number(number)),
    link: own === source ? `#/latent/${number}` : `${own.base}#/latent/${number}` };
}

function relation([one, other]) {
  if (one.source !== other.source) return `${one.source.meta.title}, and ${other.source.meta.title}`;
  const cosine = one.latent.neighbours.find(([index]) => index === other.latent.latent)?.[1];
  const jaccard = one.latent.together.jaccard.find(([index]) => index === other.latent.latent)?.[1];
  const told = [
    cosine !== undefined && `cosine of the decoder directions ${number(cosine)}`,
    jaccard !== undefined && `Jaccard index of the tokens on which they fire ${number(jaccard)}`,
  ].filter(Boolean);
  return told.length ? told.join("; ") : "Neither is among the nearest of the other.";
}

function siblings(source) {
  const { siblings: found = [] } = source.meta;
  if (!found.length) return null;
  return h("p.caption", {}, "Other dictionaries that are served: ",
    found.map(({ number: n, title }) => [h("code", {}, `${n}:latent`), ` is one of ${title}. `]));
}

function column(source, latent, link) {
  const { numbers, histogram: bins, groups, logits, explanations } = latent;
  const best = explanations.at(-1);
  const rows = [["Fires on", share(numbers.density)], ["Maximum", number(numbers.max)], ["Mean", number(numbers.mean)],
    ["Documents", count(numbers.documents)]];
  return h("div.stack", {},
    h("div", {}, h("h2.big", {}, h("a", { href: link }, String(latent.latent))),
      h("p.dim", {}, latent.note.split("\n")[0] || best?.text || latent.tokens.on.slice(0,
          5).map(([token]) => [chip(token), " "]))),
    h("dl.numbers.small", {}, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    numbers.fired ? panel("Activations",
      histogram({ edges: bins.edges, counts: bins.counts, label: "Activations", unit: "tokens", width: 420,
          height: 130 })) : h("p.remark", {}, "It never fired."),
    panel("Strongest examples", h("ol.examples", {}, groups[0].examples.slice(0, EXAMPLES).map((example, rank) =>
      h("li", { "--v": Math.min(1, example.value / numbers.max).toFixed(3) },
        h("span.peak-value", {}, figure(example.value)), tokenLine(example, numbers.max, `Example ${rank + 1}`))))),
    logits && panel("Raises",
      barList(logits.top.slice(0, 8).map(([token, value]) => [chip(token), value]), { tone: "good" })),
    latent.neighbours.length > 0 && panel("Nearest directions",
      barList(latent.neighbours.slice(0,
          6).map(([index, cosine, ...told]) => [latentLink(source, index, ...told), cosine]), { most: 1 })));
}
