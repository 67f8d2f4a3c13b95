// Pinned nodes, and groups of them that count as one.
function pin(node, on) {
  if (on) state.pinned.add(node.id); else { state.pinned.delete(node.id); state.chosen.delete(node.id); state.groups.forEach((group) => { group.ids = group.ids.filter((id) => id !== node.id); }); }
  state.groups = state.groups.filter((group) => group.ids.length);
  refresh();
}
function units() {
  const grouped = new Set(state.groups.flatMap((group) => group.ids));
  const alone = [...state.pinned].filter((id) => byId.has(id) && !grouped.has(id)).map((id) => ({ name: short(byId.get(id)), ids: [id] }));
  return [...state.groups, ...alone].map((unit) => ({ ...unit, nodes: unit.ids.filter((id) => byId.has(id)).map((id) => byId.get(id)) })).filter((unit) => unit.nodes.length);
}
function pins() {
  const box = $("pinned"), held = units();
  if (!held.length) {
    box.replaceChildren(make("p", "", "Pin nodes to keep them together, group those that mean the same, and save both with the graph."));
    return;
  }
  const grouped = new Set(state.groups.flatMap((group) => group.ids));
  const chips = [...state.pinned].filter((id) => byId.has(id) && !grouped.has(id)).map((id) => {
    const pick = button(short(byId.get(id)), () => { state.chosen[state.chosen.has(id) ? "delete" : "add"](id); pins(); }, "pick");
    pick.setAttribute("aria-pressed", state.chosen.has(id));
    return make("span", state.chosen.has(id) ? "chip chosen" : "chip", pick, close(`unpin ${short(byId.get(id))}`, () => pin(byId.get(id), false)));
  });
  const groups = state.groups.map((group, index) => make("span", "chip chosen", make("b", "", group.name), ` ${group.ids.length} nodes`, close(`ungroup ${group.name}`, () => { state.groups.splice(index, 1); pins(); })));
  const name = make("input");
  name.placeholder = "Name of the group";
  name.setAttribute("aria-label", "Name of the group");
  const form = make("form", "group-form", name, make("button", "button", `Group ${state.chosen.size} chosen`), button("Save graph.json", download));
  form.querySelector("button").disabled = state.chosen.size < 2;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    state.groups.push({ name: name.value.trim() || `group ${state.groups.length + 1}`, ids: [...state.chosen] });
    state.chosen.clear();
    pins();
  });
  const share = held.flatMap((unit) => unit.nodes).reduce((sum, node) => sum + (node.influence ?? 0), 0);
  box.replaceChildren(make("div", "chips", ...groups, ...chips), form, make("p", "", `They hold ${percent(share)} of the influence. Choose chips to group them.`), subgraph(held));
}
function close(label, onClick) {
  const made = button("×", onClick, "");
  made.setAttribute("aria-label", label);
  return made;
}
function subgraph(held) {
  const mean = (unit, of) => unit.nodes.reduce((sum, node) => sum + of(node), 0) / unit.nodes.length;
  const level = (unit) => Math.round(2 * mean(unit, (node) => node.layer - (isAttention(node) ? 0.5 : 0))) / 2;
  const levels = [...new Set(held.map(level))].sort((a, b) => b - a);
  const width = Math.max(320, $("pinned").clientWidth), box = shape("svg", { width: "100%", viewBox: `0 0 ${width} ${levels.length * 58 + 8}` });
  const place = new Map();
  levels.forEach((one, row) => {
    const level_units = held.filter((unit) => level(unit) === one).sort((a, b) => mean(a, (node) => node.position) - mean(b, (node) => node.position));
    level_units.forEach((unit, index) => place.set(unit, { x: (width * (index + 0.5)) / level_units.length, y: 24 + 58 * row, w: Math.min(176, width / level_units.length - 8) }));
  });
  const sums = [];
  for (const target of held) for (const source of held) {
    if (source === target) continue;
    let weight = 0, share = 0;
    for (const node of target.nodes) for (const link of node.inputs) if (source.nodes.includes(link.source)) { weight += link.weight; share += link.share / target.nodes.length; }
    if (share) sums.push({ source, target, weight, share });
  }
  for (const { source, target, weight, share } of sums) {
    const a = place.get(source), b = place.get(target);
    box.append(shape("path", { class: weight < 0 ? "link minus" : "link", d: `M${a.x} ${a.y - 15}C${a.x} ${a.y - 34} ${b.x} ${b.y + 34} ${b.x} ${b.y + 15}`, "stroke-width": 0.8 + 6 * share, opacity: 0.4 + 0.5 * Math.min(1, share) }));
  }
  for (const unit of held) {
    const { x, y, w } = place.get(unit), group = shape("g", { class: `node ${unit.nodes.length > 1 ? "logit" : unit.nodes[0].kind === "logit" ? "logit" : "token"}` });
    group.append(shape("rect", { class: "mark", x: x - w / 2, y: y - 15, width: w, height: 30, rx: 7 }));
    const text = shape("text", { x, y: y + 4, "text-anchor": "middle" }), room = Math.floor(w / 6.3);
    text.textContent = [...unit.name].length > room ? `${[...unit.name].slice(0, room - 1).join("")}…` : unit.name;
    group.append(text);
    group.addEventListener("click", () => select(unit.nodes[0]));
    box.append(group);
  }
  return box;
}
function download() {
  const saved = structuredClone(data.document);
  saved.qParams.pinnedIds = [...state.pinned];
  saved.links = links.map((link) => ({ source: link.source.id, target: link.target.id, weight: link.weight, ...(link.heads.length ? { granary_heads: link.heads } : {}) }));
  saved.qParams.supernodes = state.groups.map((group) => [group.name, ...group.ids]);
  const anchor = make("a");
  anchor.href = URL.createObjectURL(new Blob([JSON.stringify(saved)], { type: "application/json" }));
  anchor.download = "graph.json";
  anchor.click();
  URL.revokeObjectURL(anchor.href);
}
