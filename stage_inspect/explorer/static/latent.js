// One latent: when it fires, on what, and what it does.

import { choice, h, replace } from "./dom.js";
import { count, number, share } from "./format.js";
import { barList, histogram } from "./chart.js";
import { examplesPanel } from "./examples.js";
import { explainedPanel } from "./explained.js";
import { notesPanel, starButton } from "./notes.js";
import { picturesPanel } from "./pictures.js";
import { beside, randomLatent } from "./random.js";
import { chip } from "./tokens.js";

const NAMING = 0.5; // the F1 from which on a rule is a name

/** The page of latent `index`. */
export async function latentPage(source, [argument]) {
  const index = Number(argument);
  if (!source.has(index)) throw new Error(`There is no latent ${argument} here.`);
  const latent = await source.latent(index);
  const [before, after] = [beside(source, index, -1), beside(source, index, 1)];
  return {
    title: `Latent ${index}`,
    content: [heading(source, latent, before, after),
      latent.numbers.fired ? body(source, latent) : dead(source, latent)],
    shown: () => [before, after].forEach((other) => other !== null && source.latent(other).catch(() => {})),
  };
}

function heading(source, latent, before, after) {
  const index = latent.latent;
  const step = (id, other, sign, name) => other === null
    ? h("span.button.off", { "aria-hidden": "true" }, sign)
    : h("a.button", { id, href: `#/latent/${other}`, "aria-label": `${name}: ${other}`, title: name }, sign);
  const random = async () => { location.hash = `#/latent/${await randomLatent(source)}`; };
  return h("div.title", {},
    h("div", {}, h("p.kicker", {}, "Latent"), h("h1.big", {}, String(index)), nameOf(latent)),
    h("div.actions", {},
      step("previous", before, "←", "Previous latent"), step("next", after, "→", "Next latent"),
      h("button", { type: "button", onclick: random, title: "A latent by chance (r)" }, "Random"),
      source.meta.steer && h("a.button", { href: `#/steer?latent=${index}` }, "Steer"),
      h("a.button", { href: `#/compare/${index}` }, "Compare"),
      source.meta.writable && starButton(source, index)));
}

function nameOf({ note, explanations, tokens }) {
  const said = explanations.filter(({ method, scores }) =>
    method !== "rule" || scores.some(({ value }) => value >= NAMING)).at(-1);
  if (note) return h("p.name", {}, note.split("\n")[0]);
  if (said) return h("p.name", {}, said.text, h("span.dim", {}, ` ${said.author}`));
  return tokens.on.length ? h("p.name.names", {}, tokens.on.slice(0, 6).map(([token]) => [chip(token), " "])) : null;
}

function dead(source, latent) {
  return [
    h("p.remark", {}, `It fired on none of the ${count(source.meta.tokens)} tokens.`),
    h("div.columns", {}, logits(latent), neighbours(source, latent), feeds(source, latent)),
  ];
}

function body(source, latent) {
  return h("div.latent", {}, facts(source, latent),
    h("div.reading", {}, picturesPanel(source, latent), examplesPanel(source, latent), explainedPanel(source, latent)),
    h("div.rest", {}, activations(latent), logits(latent), firesOn(latent), neighbours(source, latent),
      together(source, latent), feeds(source, latent), notesPanel(source, latent)));
}

function facts(source, { numbers }) {
  const rows = [
    ["Fires on", share(numbers.density), `${count(numbers.fired)} of ${count(source.meta.tokens)} tokens`],
    ["Maximum", number(numbers.max), `mean ${number(numbers.mean)}, deviation ${number(numbers.std)}`],
    ["Documents", count(numbers.documents), `of ${count(source.meta.documents)}, ${count(numbers.windows)} windows`],
    ["Skew", number(numbers.skew), `excess kurtosis ${number(numbers.kurtosis)}`],
  ];
  if (numbers.encoder_decoder_cosine !== undefined) rows.push(["Encoder · decoder",
      number(numbers.encoder_decoder_cosine), "cosine of its two directions"]);
  return h("dl.numbers", {},
    rows.map(([name, value, more]) => h("div", {}, h("dt", {}, name), h("dd", {}, value, h("small", {}, more)))));
}

function activations(latent) {
  const { edges, counts } = latent.histogram;
  const marks = latent.groups[0].examples.map(({ value }) => value);
  return panel("Activations", histogram({ edges, counts, marks, label: "Activations", unit: "tokens" }),
    h("p.caption", {}, "Tokens by value, on a logarithmic axis; the ticks below are the strongest examples."));
}

/** A titled part of the page. */
export function panel(title, ...content) {
  return h("section.panel", {}, h("h2", {}, title), content);
}

function logits({ logits: found }) {
  if (!found) return null;
  const rows = (list) => list.map(([token, value]) => [chip(token), value]);
  const shown = h("div.pair", {},
    h("div", {}, h("h3", {}, "Raises"), barList(rows(found.top), { tone: "good" })),
    h("div", {}, h("h3", {}, "Lowers"), barList(rows(found.bottom), { tone: "bad" })));
  return panel("Next token", shown,
    h("p.caption", {}, "Logit weights: what a unit of activation adds to a logit, before the final norm divides."));
}

function firesOn({ tokens }) {
  if (!tokens.on.length) return null;
  const rows = (list) => list.map(([token, part]) => [chip(token), part, share(part)]);
  return panel("Tokens", h("div.pair", {},
    h("div", {}, h("h3", {}, "Fires on"), barList(rows(tokens.on))),
    h("div", {}, h("h3", {}, "Followed by"), barList(rows(tokens.next)))),
    h("p.caption", {}, "Shares of a sample of the tokens on which it fires, and of the tokens that come next."));
}

/** Another latent as a link with its name, or with what it fires on. */
export function latentLink(source, index, name, tokens = []) {
  const label = [h("b", {}, String(index)), " ",
    name ?? h("span.dim", {}, tokens.slice(0, 4).map((token) => [chip(token), " "]))];
  return source.has(index) ? h("a", { href: `#/latent/${index}` }, label) : h("span", {}, label);
}

function neighbours(source, { neighbours: found }) {
  if (!found?.length) return null;
  return panel("Nearest directions",
    barList(found.map(([index, cosine, ...told]) => [latentLink(source, index, ...told), cosine]), { most: 1 }),
    h("p.caption", {}, "Cosine of the decoder directions."));
}

const MEASURES = [
  ["jaccard", "Jaccard", "tokens on which both fire, of those on which either does"],
  ["npmi", "NPMI", "normalised pointwise mutual information"],
  ["pearson", "Pearson", "correlation of the activations, silent tokens included"],
];

function together(source, { together: found, together_tokens: tokens }) {
  const there = MEASURES.filter(([measure]) => found[measure].length);
  if (!there.length) return null;
  const list = h("div");
  const show = (measure) => replace(list,
    barList(found[measure].map(([index, value, ...told]) => [latentLink(source, index, ...told), value]), { most: 1 }));
  show(there[0][0]);
  return panel("Fires together with", choice("Measure", there, there[0][0], show), list,
    h("p.caption", {}, `Among all latents, on a sample of ${count(tokens)} tokens.`));
}

function feeds(source, { feeds: found }) {
  if (!found || !(found.sources.length + found.targets.length)) return null;
  const rows = (list) => list.map(([layer, latent, value, href, name, tokens]) =>
    [otherLatent(source, `${layer} / ${latent}`, href, name, tokens), value]);
  const end = (title, list) => list.length ? h("div", {}, h("h3", {}, title), barList(rows(list))) : null;
  return panel("Across layers", h("div.pair.feeds", {},
    end("Fed by", found.sources), end("Feeds", found.targets)),
    h("p.caption", {}, `Layer / latent, and what passes along the residual stream: target-weighted expected residual `
      + `attribution on ${count(found.tokens)} tokens. Paths through attention are not in it.`));
}

/** A latent of any layer, a link where its page is here: in this run, or in one that is served beside it. */
function otherLatent(source, place, href, name, tokens) {
  const label = [h("b", {}, place), " ",
    name ?? h("span.dim", {}, tokens.slice(0, 4).map((token) => [chip(token), " "]))];
  const isHere = href && (!href.startsWith("#") || source.has(Number(href.split("/").at(-1))));
  return isHere ? h("a", { href }, label) : h("span", {}, label);
}
