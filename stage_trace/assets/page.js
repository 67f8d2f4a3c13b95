const svg = $("graph");
const shape = (name, attributes = {}) => {
  const element = document.createElementNS(svg.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};

// The graph as read: nodes by number, each with the links that enter and leave it.
const nodes = data.nodes;
nodes.forEach((node, number) => Object.assign(node, { number, inputs: [], outputs: [] }));
const links = data.links.map(([source, target, weight, heads]) => ({ source: nodes[source], target: nodes[target], weight, heads: heads ?? [] }));
links.forEach((link) => { link.target.inputs.push(link); link.source.outputs.push(link); });
for (const node of nodes) {
  const total = node.inputs.reduce((sum, link) => sum + Math.abs(link.weight), 0);
  node.inputs.forEach((link) => { link.share = Math.abs(link.weight) / total; });
  node.inputs.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
}
nodes.forEach((node) => node.outputs.sort((a, b) => b.share - a.share));
const byId = new Map(nodes.map((node) => [node.id, node]));
const state = { selected: null, pinned: new Set(data.pinned), groups: data.supernodes.map(([name, ...ids]) => ({ name, ids })), chosen: new Set() };

// Places: positions from left to right, layers upwards, biases in a column of their own.
const STEP = 17, GUTTER = 62, LEAST = 46;
const pieces = data.pieces.map(visible);
const textWidth = (text, size = 7.3) => [...text].length * size + 16;
const isInner = (node) => !["token", "logit"].includes(node.kind);
const isAttention = (node) => node.site === "attn_out";  // of a Lorsa, drawn below its layer's MLP
const rowOf = (node) => `${isAttention(node) ? "A" : ""}${node.layer}`;
const cellOf = (node) => `${rowOf(node)}/${node.kind === "bias" ? "bias" : node.position}`;

function layout(width) {
  const cells = new Map();
  nodes.filter(isInner).forEach((node) => {
    const key = cellOf(node);
    cells.set(key, [...(cells.get(key) ?? []), node]);
  });
  const perRow = 6;
  const rowsOf = {}, widthOf = pieces.map((piece) => Math.max(LEAST, Math.min(textWidth(piece), 150)));
  for (const [key, held] of cells) {
    const [row, position] = key.split("/");
    rowsOf[row] = Math.max(rowsOf[row] ?? 1, Math.ceil(held.length / perRow));
    if (position !== "bias") widthOf[position] = Math.max(widthOf[position], Math.min(held.length, perRow) * STEP + 16);
  }
  const hasBias = nodes.some((node) => node.kind === "bias");
  const left = GUTTER + (hasBias ? 40 : 0);
  const natural = left + widthOf.reduce((a, b) => a + b, 0) + 14;
  const spread = Math.max(0, width - natural) / pieces.length;
  const columns = [];
  let x = left;
  widthOf.forEach((w) => { columns.push({ x, width: w + spread, centre: x + (w + spread) / 2 }); x += w + spread; });
  const total = Math.max(width, x + 14);

  const logits = nodes.filter((node) => node.kind === "logit");
  let row = 0, right = total - 14;
  for (const node of logits) {
    node.text_shown = `${visible(node.text)}  ${percent(node.probability)}`;
    const w = textWidth(node.text_shown, 7);
    if (right - w < left) { row += 1; right = total - 14; }
    Object.assign(node, { x: right - w / 2, y: 26 + 32 * row, width: w });
    right -= w + 8;
  }
  const bands = [];
  let y = 26 + 32 * row + 34;
  for (let layer = data.layers; layer >= 0; layer--) {
    for (const name of [`${layer}`, `A${layer}`]) {
      const isShown = name in rowsOf || (name === `${layer}` && layer < data.layers);
      if (!isShown) continue;
      const height = (rowsOf[name] ?? 1) * STEP + 22;
      bands.push({ name, y, height });
      y += height + 8;
    }
  }
  const bandOf = new Map(bands.map((band) => [band.name, band]));
  for (const [key, held] of cells) {
    const [name, position] = key.split("/");
    const centre = position === "bias" ? GUTTER + 12 : columns[position].centre;
    held.sort((a, b) => b.influence - a.influence).forEach((node, index) => {
      const inRow = Math.min(perRow, held.length - perRow * Math.floor(index / perRow));
      node.x = centre + ((index % perRow) - (inRow - 1) / 2) * STEP;
      node.y = bandOf.get(name).y + 11 + STEP / 2 + STEP * Math.floor(index / perRow);
    });
  }
  nodes.filter((node) => node.kind === "token").forEach((node) => {
    Object.assign(node, { x: columns[node.position].centre, y: y + 20, width: columns[node.position].width - 6 });
  });
  return { total, height: y + 48, bands, columns };
}

const radius = (node) => 3.6 + 4.4 * Math.sqrt(Math.min(1, (node.influence ?? 0) / largest));
const largest = Math.max(1e-9, ...nodes.filter((node) => node.kind === "feature").map((node) => node.influence));
function mark(node) {
  if (node.kind === "token" || node.kind === "logit") {
    return shape("rect", { class: "mark", x: node.x - node.width / 2, y: node.y - 12, width: node.width, height: 24, rx: 6 });
  }
  const r = radius(node);
  if (node.kind === "feature" && isAttention(node)) {
    const top = 1.25 * r, side = 1.1 * r;
    return shape("path", { class: "mark", d: `M${node.x} ${node.y - top}L${node.x + side} ${node.y + 0.65 * top}H${node.x - side}Z` });
  }
  if (node.kind === "feature" || node.kind === "bias") return shape("circle", { class: "mark", cx: node.x, cy: node.y, r });
  const side = r * 1.6;
  const turned = node.kind === "error" ? `rotate(45 ${node.x} ${node.y})` : "";
  return shape("rect", { class: "mark", x: node.x - side / 2, y: node.y - side / 2, width: side, height: side, rx: 1, transform: turned });
}

const look = (node) => (isAttention(node) ? `${node.kind} attention` : node.kind);
function curve(link) {
  const from = link.source, to = link.target;
  const y0 = from.y - (isInner(from) ? 0 : 12), y1 = to.y + (isInner(to) ? 0 : 12), bend = (y0 - y1) * 0.45;
  return `M${from.x.toFixed(1)} ${y0.toFixed(1)}C${from.x.toFixed(1)} ${(y0 - bend).toFixed(1)} ${to.x.toFixed(1)} ${(y1 + bend).toFixed(1)} ${to.x.toFixed(1)} ${y1.toFixed(1)}`;
}
const drawn = (link, opacity) => shape("path", {
  class: link.weight < 0 ? "link minus" : "link", d: curve(link), "stroke-width": (0.6 + 5 * link.share).toFixed(2), opacity: opacity.toFixed(2),
});

let layers = null;
function draw() {
  const { total, height, bands, columns } = layout($("scroll").clientWidth || 900);
  svg.replaceChildren();
  svg.setAttribute("width", total);
  svg.setAttribute("height", height);
  svg.setAttribute("viewBox", `0 0 ${total} ${height}`);
  const names = shape("g");
  for (const band of bands) {
    svg.append(shape("rect", { class: "band", x: 8, y: band.y, width: total - 16, height: band.height, rx: 7 }));
    const text = shape("text", { x: 18, y: band.y + band.height / 2 + 4 });
    text.textContent = band.name === `${data.layers}` ? "norm" : band.name.replace(/^(?=\d)/, "L");
    names.append(shape("rect", { class: "tab", x: 8, y: band.y, width: 38, height: band.height, rx: 7 }), text);
  }
  columns.slice(1).forEach((column) => svg.append(shape("line", { class: "column", x1: column.x, x2: column.x, y1: bands[0].y, y2: height - 46 })));
  const under = shape("g"), over = shape("g");
  svg.append(under, over, names);
  layers = { under, names };
  follow();
  for (const node of nodes) {
    const group = shape("g", { class: `node ${look(node)}`, tabindex: "0", role: "button", "aria-label": `${node.label}${isInner(node) && node.kind !== "bias" ? ` at ${pieces[node.position]}` : ""}` });
    group.append(shape("circle", { class: "ring", cx: node.x, cy: node.y, r: radius(node) + 4 }), mark(node));
    if (isInner(node)) group.append(shape("circle", { class: "hit", cx: node.x, cy: node.y, r: STEP / 2 }));
    else {
      const special = data.fixed.includes(node.position) && node.kind === "token";
      const text = shape("text", { class: special ? "piece quiet" : "piece", x: node.x, y: node.y + 4, "text-anchor": "middle" });
      const room = Math.floor((node.width - 8) / 7.3), said = node.kind === "logit" ? node.text_shown : pieces[node.position];
      text.textContent = node.kind === "token" && [...said].length > room ? `${[...said].slice(0, Math.max(1, room - 1)).join("")}…` : said;
      group.append(text);
    }
    group.addEventListener("click", () => select(node === state.selected ? null : node));
    group.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); select(node); } });
    group.addEventListener("pointerenter", (event) => tell(node, event));
    group.addEventListener("pointerleave", () => { $("tip").hidden = true; });
    over.append(group);
    node.group = group;
  }
  refresh();
}

// The names of the layers stay in sight when the graph is scrolled.
function follow() { layers.names.setAttribute("transform", `translate(${$("scroll").scrollLeft} 0)`); }

// Shown without a selection: the strongest inputs of the nodes that matter.
const backbone = links.filter((link) => link.share > 0.02)
  .sort((a, b) => b.share * weightOf(b.target) - a.share * weightOf(a.target)).slice(0, 220);
function weightOf(node) { return node.kind === "logit" ? node.probability : node.influence ?? 0; }

function refresh() {
  const node = state.selected;
  const shown = node ? [...node.inputs, ...node.outputs] : backbone;
  const near = new Set(shown.flatMap((link) => [link.source, link.target]));
  layers.under.replaceChildren(...shown.map((link) => drawn(link, node ? 0.35 + 0.6 * link.share : 0.1 + 0.5 * link.share)));
  svg.classList.toggle("dim", Boolean(node));
  for (const one of nodes) {
    one.group.classList.toggle("selected", one === node);
    one.group.classList.toggle("near", near.has(one));
    one.group.classList.toggle("pinned", state.pinned.has(one.id));
  }
  detail();
  pins();
}

function select(node) {
  state.selected = node;
  refresh();
  if (node) $("scroll").scrollTo({ left: node.x - $("scroll").clientWidth / 2 });
  $("detail").scrollTop = 0;
}

function tell(node, event) {
  const lines = [make("b", "", title(node))], about = hint(node);
  if (about) lines.push(make("span", "", about), make("br"));
  if (isInner(node) && node.kind !== "bias") lines.push(make("span", "", `at “${pieces[node.position]}” (${node.position})`));
  if (node.influence !== null) lines.push(make("br"), make("span", "", `${percent(node.influence)} of the influence`));
  const tip = $("tip");
  tip.replaceChildren(...lines);
  tip.hidden = false;
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - 270)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - 80)}px`;
}

const ATTENTION = { feature: "Attention feature", error: "Error of attention", fixed: "Fixed position" };
const KINDS = { feature: "Feature", error: "Error", fixed: "Fixed position", bias: "Biases", token: "Token", logit: "Next token" };
const ABOUT = {
  error: "What the MLP adds here beside the active latents: what its transcoder does not explain.",
  fixed: "The whole output of the MLP here: no dictionary was taught at this position.",
  bias: "All that this layer adds whatever it reads: biases of its norms, its attention and its transcoder.",
  token: "The embedding of this token.",
};
const ABOUT_ATTENTION = {
  feature: "A latent of the Lorsa that stands in for this layer's attention: it reads the positions that its own pattern attends to.",
  error: "What attention adds here beside the active latents: what its Lorsa does not explain.",
  fixed: "All that attention adds here: no dictionary was taught at this position.",
};
const about = (node) => (isAttention(node) ? ABOUT_ATTENTION : ABOUT)[node.kind];
const title = (node) => (node.kind === "token" || node.kind === "logit" ? visible(node.text) : node.name || node.label);
const NAMES = {
  feature: (node) => `${isAttention(node) ? "A" : "L"}${node.layer}/${node.latent}`,
  error: (node) => `${isAttention(node) ? "A" : "L"}${node.layer} error`,
  fixed: (node) => `L${node.layer} ${isAttention(node) ? "attention" : "MLP"}`,
};
// What a feature without a name is about: the tokens that it fires on, or those that it writes for.
function hint(node) {
  if (node.kind !== "feature" || node.name) return "";
  const card = cardOf(node), on = card?.tokens.slice(0, 4).map(([token]) => visible(token)) ?? [];
  const up = (card?.promoted.length ? card.promoted : node.promotes ?? []).slice(0, 3).map(visible);
  return [on.length ? `on ${on.join(" ")}` : "", up.length ? `for ${up.join(" ")}` : ""].filter(Boolean).join("  →  ");
}
const short = (node) => (NAMES[node.kind] ? `${NAMES[node.kind](node)}  ${pieces[node.position]}${node.name ? `  ${node.name}` : ""}` : node.kind === "bias" ? node.label : `${node.kind === "token" ? "token" : "says"}  ${title(node)}`);

// What a node's details are made of, in this order; each gives an element or null.
const SECTIONS = [where, attended, numbers, examples, words, ablation, (node) => feeds("What feeds it", node.inputs, "source"), (node) => feeds("What it feeds", node.outputs, "target"), command];

function detail() {
  const node = state.selected, box = $("detail");
  if (!node) { box.replaceChildren(...overview()); return; }
  const pinned = state.pinned.has(node.id);
  const parts = [
    make("span", `badge ${look(node)}`, (isAttention(node) ? ATTENTION : KINDS)[node.kind]), make("h3", "", title(node)),
    make("div", "actions", button(pinned ? "Unpin" : "Pin", () => pin(node, !pinned), pinned ? "button on" : "button"), button("Close", () => select(null))),
    about(node) ? make("p", "quiet", about(node)) : null, ...SECTIONS.map((section) => section(node)),
  ];
  box.replaceChildren(...parts.filter((part) => part !== null));
}

function overview() {
  const top = nodes.filter((node) => node.kind === "feature").sort((a, b) => b.influence - a.influence).slice(0, 14);
  const most = top.length ? top[0].influence : 1;
  return [
    make("h2", "", "Most influential features"),
    make("p", "quiet", "Choose one, here or in the graph, to see what feeds it and what it feeds. Larger marks matter more. Arrow keys go on from there, / searches."),
    make("ul", "feeds", ...top.map((node) => line(node, node.influence / most, percent(node.influence), false))),
  ];
}

function where(node) {
  if (node.kind === "bias") return null;
  const box = make("div", "where");
  data.pieces.forEach((piece, position) => box.append(position === node.position && node.kind !== "logit" ? make("mark", "", piece.trim() ? piece : visible(piece)) : piece));
  if (node.kind === "logit") box.append(make("mark", "", visible(node.text)));
  return box;
}

const MOST_ATTENDED = 8;
function attended(node) {
  if (!node.attends) return null;
  const chips = node.attends.slice(0, MOST_ATTENDED).map(([position, share]) => make("code", "", `${pieces[position]} ${percent(share)}`));
  chips.forEach((chip, index) => { chip.title = `token ${node.attends[index][0]}`; });
  return make("div", "", make("h4", "", "Its pattern attends to"), make("div", "words", ...chips));
}

function numbers(node) {
  const rows = [["Probability", node.kind === "logit" ? percent(node.probability) : null], ["Activation", node.activation === null ? null : figure(node.activation)],
    ["Influence", node.influence === null ? null : percent(node.influence)], ["Token", isInner(node) || node.kind === "token" ? (node.kind === "bias" ? null : String(node.position)) : null]];
  const kept = rows.filter(([, value]) => value !== null);
  return make("dl", "pairs", ...kept.map(([name, value]) => make("div", "", make("dt", "", name), make("dd", "", value))));
}

const cardOf = (node) => data.cards[node.card];

function examples(node) {
  const card = cardOf(node);
  if (!card) return null;
  const shown = card.examples.map((example) => {
    const text = make("div", "example");
    example.pieces.forEach((piece, index) => {
      const heat = example.heat[index];
      if (!heat) { text.append(piece); return; }
      const mark = make("mark", "", piece);
      mark.style.setProperty("--heat", `${6 * heat}%`);
      text.append(mark);
    });
    text.title = `activation ${figure(example.value)} at its peak`;
    return text;
  });
  const on = make("div", "words", ...card.tokens.map(([token, share]) => { const code = make("code", "", visible(token)); code.title = percent(share); return code; }));
  return make("div", "", make("h4", "", `Where it fires most: ${percent(card.fired)} of tokens, up to ${figure(card.max)}`), ...shown, make("h4", "", "Tokens that it fires on"), on);
}

function words(node) {
  const card = cardOf(node), up = card?.promoted.length ? card.promoted : node.promotes, down = card?.promoted.length ? card.demoted : node.suppresses;
  if (!up) return null;
  const list = (texts, className) => make("div", `words ${className}`, ...texts.map((text) => make("code", "", visible(text))));
  return make("div", "", make("h4", "", "Writes for, by its direct path"), list(up, "up"), make("h4", "", "and against"), list(down, "down"));
}

function ablation(node) {
  const row = data.certificate?.ablations.find((one) => one.node_id === node.id);
  if (!row) return null;
  const cells = [["predicted", row.predicted], ["both held", row.frozen], ["norms held", row.norms], ["all free", row.open]];
  return make("div", "", make("h4", "", `Without it, the logit of “${visible(byId.get(data.certificate.logit).text)}”`),
    make("dl", "pairs", ...cells.map(([name, value]) => make("div", "", make("dt", "", name), make("dd", "", figure(value))))));
}

const carried = (link) => link.heads.map(([layer, head, weight]) => `L${layer} head ${head} ${figure(weight)}`).join(", ");

function line(node, share, text, isMinus, told = "") {
  const fill = make("i");
  fill.style.width = `${Math.max(2, 100 * share).toFixed(1)}%`;
  const row = button("", () => select(node), isMinus ? "minus" : "");
  const said = [hint(node), told && `by ${told}`].filter(Boolean);
  row.append(make("span", "name", short(node)), make("span", "track", fill), make("span", "num", text), ...said.map((one) => make("small", "", one)));
  row.title = [short(node), ...said].join("\n");
  return make("li", "", row);
}

const FIRST = 10;  // of a list, until all are asked for
function feeds(name, held, end) {
  if (!held.length) return null;
  const most = held[0].share;
  const rows = (some) => some.map((link) => line(link[end], link.share / most, figure(link.weight), link.weight < 0, carried(link)));
  const list = make("ul", "feeds", ...rows(held.slice(0, FIRST)));
  const more = button(`Show all ${held.length}`, () => { list.append(...rows(held.slice(FIRST))); more.remove(); });
  return make("div", "", make("h4", "", name), list, held.length > FIRST ? more : null);
}

function command(node) {
  if (node.kind !== "feature") return null;
  const card = cardOf(node), quoted = card ? `'${card.folder.replaceAll("'", "'\\''")}'` : null;
  return make("div", "", make("h4", "", "Steer it: in Python"), make("pre", "snippet", `graph.intervene({"${node.id}": 0.0})`),
    card ? make("h4", "", `in the explorer, as latent ${card.number}`) : null, card ? make("pre", "snippet", `granary explore ${quoted}`) : null);
}

// Arrows: left and right to the neighbour of the same layer, up to what the node feeds most, down to what feeds it most.
function neighbour(node, key) {
  if (key === "ArrowUp") return node.outputs[0]?.target;
  if (key === "ArrowDown") return node.inputs[0]?.source;
  const row = nodes.filter((one) => rowOf(one) === rowOf(node) && (one.kind === "token") === (node.kind === "token") && (one.kind === "logit") === (node.kind === "logit"));
  row.sort((a, b) => a.x - b.x || b.y - a.y);
  return row[row.indexOf(node) + (key === "ArrowLeft" ? -1 : 1)];
}
function key(event) {
  if (event.target.closest("input")) { if (event.key === "Escape") event.target.blur(); return; }
  if (event.key === "Escape") select(null);
  if (event.key === "/") { event.preventDefault(); $("search").focus(); }
  if (!event.key.startsWith("Arrow") || !state.selected || event.altKey || event.ctrlKey || event.metaKey) return;
  const next = neighbour(state.selected, event.key);
  event.preventDefault();
  if (next) { select(next); next.group.focus({ preventScroll: true }); }
}

function search() {
  const wanted = $("search").value.trim().toLowerCase();
  svg.classList.toggle("searching", Boolean(wanted));
  for (const node of nodes) {
    const text = [node.label, node.name, node.id, node.text, pieces[node.position], ...(node.promotes ?? [])].join(" ").toLowerCase();
    node.group.classList.toggle("found", wanted !== "" && text.includes(wanted));
  }
}

function header() {
  const heading = $("prompt"), logit = nodes.find((node) => node.kind === "logit");
  heading.append(data.prompt);
  if (logit) heading.append(make("span", "said", visible(logit.text), make("small", "", percent(logit.probability))));
  document.title = `${data.prompt.slice(0, 60)} – attribution graph`;
  for (const [name, value, about] of data.facts) $("facts").append(make("div", "", make("dt", "", name), make("dd", "", value, make("small", "", about))));
  $("footer").textContent = data.footer;
}

function certificate() {
  const box = $("certificate"), held = data.certificate;
  if (!held) { box.hidden = true; return; }
  box.append(make("p", "", data.certificate_text));
  const head = ["Ablated", "predicted", "both held", "norms held", "all free"];
  const rows = held.ablations.map((one) => make("tr", "", make("td", "", byId.has(one.node_id) ? button(short(byId.get(one.node_id)), () => { select(byId.get(one.node_id)); $("scroll").scrollIntoView({ block: "center" }); }, "") : one.node_id),
    ...[one.predicted, one.frozen, one.norms, one.open].map((value) => make("td", "", figure(value)))));
  box.append(make("div", "scroll", make("table", "", make("thead", "", make("tr", "", ...head.map((name) => make("th", "", name)))), make("tbody", "", ...rows))));
}

function spliced() {
  if (data.spliced_text) $("spliced").append(make("p", "", data.spliced_text));
  else $("spliced").hidden = true;
}

$("legend_attention").hidden = !nodes.some(isAttention);
header();
certificate();
spliced();
draw();
$("scroll").scrollLeft = $("scroll").scrollWidth; // what is said stands above the last token
$("scroll").addEventListener("scroll", follow, { passive: true });
$("search").addEventListener("input", search);
addEventListener("keydown", key);
let resizing = 0;
addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(() => { draw(); search(); }, 120); });
