// Latents as rows of a table, one of them open beside it. A latent's key is "layer/number".
const MOST_ROWS = 200;
const latents = data.latents.map(([layer, number, fired, name, firing, promoted, sources, targets]) => ({
  key: `${layer}/${number}`, fired, name, firing, promoted, sources, targets,
  text: [`${layer}/${number}`, name, ...firing, ...promoted].join("\n").toLowerCase(),
}));
const byKey = new Map(latents.map((latent) => [latent.key, latent]));
const said = (key) => { const [layer, number] = key.split("/"); return `layer ${layer}, latent ${number}`; };
const codes = (texts, className) => make("div", `words ${className}`, ...texts.map((text) => make("code", "", visible(text))));
const short = (texts) => texts.slice(0, 4).map(visible).join(" ");

function table() {
  const wanted = $("search").value.trim().toLowerCase();
  const found = latents.filter((latent) => !wanted || latent.text.includes(wanted));
  const first = (latent) => Math.abs(latent.sources[0]?.[1] ?? 0);
  const shown = wanted ? found : [...found].sort((a, b) => first(b) - first(a));
  $("count").textContent = found.length > MOST_ROWS ? `${MOST_ROWS} of ${found.length}` : `${found.length} latents`;
  $("latents").replaceChildren(...shown.slice(0, MOST_ROWS).map((latent) => make("tr", "",
    make("td", "", button(latent.name || latent.key, () => open(latent.key), "")),
    make("td", "", codes(latent.firing, "")), make("td", "", codes(latent.promoted, "up")), make("td", "", percent(latent.fired)),
    make("td", "", latent.sources.length ? `${latent.sources[0][0]}: ${figure(latent.sources[0][1])}` : "–"))));
}

function feeds(title, held, nothing) {
  const most = Math.max(...held.map(([, value]) => Math.abs(value)));
  const lines = held.map(([key, value, weight, both]) => {
    const other = byKey.get(key);
    const bar = make("i", "");
    bar.style.width = `${(100 * Math.abs(value)) / most}%`;
    const name = make("span", "name", other?.name || said(key)), about = make("small", "", short(other?.firing ?? []));
    const line = button("", () => open(key), value < 0 ? "minus" : "");
    line.title = `virtual weight ${figure(weight)}, both fire on ${both} tokens of the sample`;
    line.append(name, make("span", "track", bar), make("span", "num", figure(value)), about);
    line.disabled = other === undefined;
    return make("li", "", line);
  });
  return [make("h4", "", title), lines.length ? make("ul", "feeds", ...lines) : make("p", "quiet", nothing)];
}

function open(key) {
  const latent = byKey.get(key);
  if (!latent) { $("detail").replaceChildren(make("p", "quiet", "Choose a latent.")); return; }
  if (location.hash !== `#${key}`) history.replaceState(null, "", `#${key}`);
  $("detail").replaceChildren(
    make("span", "badge", said(key)), make("h3", "", latent.name || said(key)),
    make("p", "quiet", `fires on ${percent(latent.fired)} of tokens`),
    ...(latent.firing.length ? [make("h4", "", "Fires on"), codes(latent.firing, "")] : []),
    ...(latent.promoted.length ? [make("h4", "", "Writes for, directly"), codes(latent.promoted, "up")] : []),
    ...feeds("What feeds it", latent.sources, "Nothing in an earlier layer fires with it, or it never fires."),
    ...feeds("What it feeds", latent.targets, "Nothing in a later layer fires with it, or it never fires."));
}

$("facts").append(...data.facts.map(([name, value, told]) => make("div", "", make("dt", "", name), make("dd", "", value, make("small", "", told)))));
$("footer").textContent = data.footer;
$("search").addEventListener("input", table);
window.addEventListener("hashchange", () => open(location.hash.slice(1)));
table();
open(location.hash.slice(1) || latents.reduce((a, b) => (Math.abs(b.sources[0]?.[1] ?? 0) > Math.abs(a.sources[0]?.[1] ?? 0) ? b : a)).key);
