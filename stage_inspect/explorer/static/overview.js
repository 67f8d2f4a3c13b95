// The dictionary at a glance: how often its latents fire, how strongly, and which never do.

import { h } from "./dom.js";
import { count, number, share } from "./format.js";
import { histogram } from "./chart.js";
import { panel } from "./latent.js";
import { scatter } from "./scatter.js";

const DENSE = 0.1;

/** The page. */
export async function overviewPage(source) {
  const { meta } = source;
  const [density, max] = await Promise.all([source.column("density"), source.column("max")]);
  const held = meta.only ?? density.keys();
  const alive = [...held].filter((index) => density[index] > 0);
  const total = meta.only?.length ?? meta.d_latent;
  const dead = total - alive.length;
  const dense = alive.filter((index) => density[index] > DENSE).length;
  const l0 = alive.reduce((sum, index) => sum + density[index], 0);
  const middle = Float32Array.from(alive, (index) => density[index]).sort()[Math.floor(alive.length / 2)] ?? 0;
  const cards = [
    ["Latents", count(total), meta.only ? `of ${count(meta.d_latent)} in the dictionary` : meta.kind],
    ["Dead", count(dead), h("a", { href: "#/latents?density=0..0" }, dead ? share(dead / total) : "none"),
      " fired on no token"],
    ["Dense", count(dense), h("a", { href: `#/latents?density=${DENSE}..` }, `above ${share(DENSE)}`)],
    ["Median firing", share(middle), "of the tokens, among those that fire"],
    meta.only ? null : ["Per token", number(l0, 3), "latents that fire, on average"],
    ["Tokens read", count(meta.tokens), `${count(meta.documents)} documents`],
  ].filter(Boolean);
  return {
    title: "Overview",
    content: [
      h("div.title", {}, h("div", {}, h("p.kicker", {}, meta.kind), h("h1", {}, meta.title),
          h("p.lead", {}, meta.about))),
      h("dl.numbers", {}, cards.map(([name, value, ...more]) => h("div", {}, h("dt", {}, name),
            h("dd", {}, value, h("small", {}, more))))),
      h("div.overview", {},
        panel("How often latents fire", densities(alive, density),
          h("p.caption", {}, "Latents by the share of tokens on which they fire. A bar opens the table of these.")),
        panel("How often and how strongly", scatter({
          label: "Each latent by how often it fires and its strongest activation",
          indices: alive, x: density, y: max, xLabel: "share of tokens", yLabel: "maximum", logarithmic: true,
          tell: (index) => `latent ${index}: ${share(density[index])}, maximum ${number(max[index])}`,
        }), h("p.caption", {},
          "A point is a latent; it opens its page. With the keyboard: arrows go from point to point, Enter opens."))),
      provenance(meta),
    ],
  };
}

function densities(alive, density) {
  if (!alive.length) return h("p.dim", {}, "No latent fired.");
  let low = Infinity;
  let high = 0;
  for (const index of alive) {
    low = Math.min(low, density[index]);
    high = Math.max(high, density[index]);
  }
  const perDecade = 8;
  const first = Math.floor(Math.log10(low) * perDecade);
  const bins = Math.max(1, Math.floor(Math.log10(high) * perDecade) - first + 1);
  const counts = new Array(bins).fill(0);
  for (const index of alive) counts[Math.min(bins - 1,
      Math.max(0, Math.floor(Math.log10(density[index]) * perDecade) - first))] += 1;
  const edges = Array.from({ length: bins + 1 }, (_, bin) => 10 ** ((first + bin) / perDecade));
  const short = (value) => Number(value.toPrecision(3));
  return histogram({
    edges, counts, label: "Latents by density", unit: "latents", width: 560, height: 322,
    choose: (from, to) => { location.hash = `#/latents?density=${short(from)}..${short(to)}`; },
  });
}

function provenance(meta) {
  return h("section.panel", {}, h("h2", {}, "Where it comes from"),
    h("dl.origin", {}, meta.origin.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))));
}
