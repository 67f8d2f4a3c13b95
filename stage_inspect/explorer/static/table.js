// All latents as a table: only the rows in sight are there, sorting and filtering happens on whole columns.

import { afterwards, h, replace } from "./dom.js";
import { count, figure, share } from "./format.js";
import { bounds, filter, order } from "./sort.js";
import { chip } from "./tokens.js";

const HEIGHT = 36;
const SPARE = 8;
const remembered = { query: null, top: 0 };

/** The page; its address holds sort, filters and words, so that a view can be sent to someone. */
export async function tablePage(source, _, query) {
  const all = source.meta.columns.filter(({ listed }) => listed);
  const chosen = query.get("show")?.split(",") ?? all.filter(({ shown }) => shown).map(({ name }) => name);
  const state = {
    sort: query.get("sort") ?? "-density",
    words: query.get("q") ?? "",
    bounds: new Map(all.filter(({ name }) => query.has(name)).map(({ name }) => [name, query.get(name)])),
    columns: all.filter(({ name }) => chosen.includes(name)),
  };
  const table = new Table(source, state);
  await table.update();
  return {
    title: "Latents", wide: true, content: table.content(), shown: () => table.shown(), leave: () => table.leave(),
  };
}

class Table {
  constructor(source, state) {
    Object.assign(this, { source, state, rows: new Uint32Array(0), orders: new Map(), active: 0, error: null });
    this.sheet = h("div.sheet", { role: "rowgroup" });
    this.told = h("p.caption", { role: "status" });
    this.refresh = afterwards(() => this.update().then(() => this.draw(true)), 160);
    this.draw = this.draw.bind(this);
  }

  content() {
    this.grid = h("div.grid", { role: "grid", "aria-label": "Latents", onkeydown: (event) => this.keys(event) },
      h("div.inner", {}, this.header(), this.sheet));
    this.grid.addEventListener("scroll", () => requestAnimationFrame(() => this.draw()), { passive: true });
    const words = h("input", {
      type: "search", value: this.state.words, placeholder: "words, or a token",
      "aria-label": "Words of a name, or a token",
      oninput: (event) => { this.state.words = event.target.value; this.refresh(); },
    });
    return [
      h("div.title", {},
        h("div", {}, h("h1", {}, "Latents"), this.told),
        h("div.actions", {}, h("label", {}, words), this.columnMenu(),
          h("button", { type: "button", onclick: () => { location.hash = "#/latents"; } }, "Clear"))),
      this.grid,
    ];
  }

  template() {
    return ["88px", ...this.state.columns.map(() => "136px"), "minmax(300px, 1fr)"].join(" ");
  }

  header() {
    const head = (name, title, hint, figure) => {
      const [column, descending] = [this.state.sort.replace(/^-/, ""), this.state.sort.startsWith("-")];
      const sorted = column === name;
      return h(`div${figure ? ".figure" : ".first"}`,
        { role: "columnheader", "aria-sort": sorted ? (descending ? "descending" : "ascending") : null },
        h("button", { type: "button", title: hint, onclick: () => this.sortBy(name) }, title,
          sorted ? (descending ? " ↓" : " ↑") : ""),
        figure && this.range(name, title));
    };
    const row = h("div.top", { role: "row" }, head("latent", "Latent", "by number", false),
      this.state.columns.map(({ name, title, help }) => head(name, title, help, true)),
      h("div.heading", { role: "columnheader" }, "Name, strongest tokens"));
    row.style.gridTemplateColumns = this.template();
    this.top = row;
    return row;
  }

  range(name, title) {
    const [low, high] = (this.state.bounds.get(name) ?? "..").split("..");
    const change = () => {
      const [from, to] = inputs.map((input) => input.value.trim());
      if (from || to) this.state.bounds.set(name, `${from}..${to}`);
      else this.state.bounds.delete(name);
      this.refresh();
    };
    const inputs = [["from", low ?? ""], ["to", high ?? low ?? ""]].map(([what, value]) =>
      h("input", {
        type: "text", inputmode: "decimal", value, placeholder: what, "aria-label": `${title} ${what}`, oninput: change,
      }));
    return h("div.range", {}, inputs);
  }

  columnMenu() {
    const all = this.source.meta.columns.filter(({ listed }) => listed);
    const shown = new Set(this.state.columns.map(({ name }) => name));
    const boxes = all.map(({ name, title, help }) => {
      const box = h("input", { type: "checkbox", checked: shown.has(name), onchange: () => {
        if (box.checked) shown.add(name);
        else shown.delete(name);
        this.state.columns = all.filter((column) => shown.has(column.name));
        this.top.replaceWith(this.header());
        this.draw(true);
        this.address();
      } });
      return h("label", { title: help }, box, " ", title);
    });
    return h("details.menu", {}, h("summary.button", {}, "Columns"), h("div.sheet-of-boxes", {}, boxes));
  }

  async sortBy(name) {
    const first = name === "latent" ? name : `-${name}`; // figures begin with the largest
    this.state.sort = this.state.sort !== first ? first : first === name ? `-${name}` : name;
    await this.update();
    const fresh = this.header();
    this.top.replaceWith(fresh);
    [...fresh.querySelectorAll("button")].find((button) => button.parentElement.hasAttribute("aria-sort"))?.focus();
    this.grid.scrollTop = 0;
    this.active = 0;
    this.draw(true);
  }

  /** Find the rows to show: sorted, within the bounds, with the words. */
  async update() {
    const mine = (this.turn = (this.turn ?? 0) + 1);
    const { sort, words } = this.state;
    this.error = null;
    try {
      const wanted = words.trim() ? new Set((await this.source.search(words.trim())).latents) : null;
      const limits = [];
      for (const [name, text] of this.state.bounds) {
        const [low, high] = bounds(text);
        limits.push({ column: await this.source.column(name), low, high });
      }
      if (!this.orders.has(sort)) this.orders.set(sort, await this.ordered(sort));
      if (mine !== this.turn) return;
      this.rows = filter(this.orders.get(sort), limits, wanted);
    } catch (error) {
      this.error = error.message;
      this.rows = new Uint32Array(0);
    }
    this.address();
    const all = this.source.meta.only?.length ?? this.source.meta.d_latent;
    replace(this.told, this.error
        ?? (this.rows.length === all ? `${count(all)} latents`
            : `${count(this.rows.length)} of ${count(all)} latents`));
  }

  async ordered(sort) {
    const [name, descending] = [sort.replace(/^-/, ""), sort.startsWith("-")];
    const { only, d_latent } = this.source.meta;
    const held = only ? Uint32Array.from(only) : null;
    if (name === "latent") {
      const rows = held ?? Uint32Array.from({ length: d_latent }, (_, row) => row);
      return descending ? rows.slice().reverse() : rows;
    }
    const rows = order(await this.source.column(name), descending);
    if (!held) return rows;
    const kept = new Set(held);
    return rows.filter((row) => kept.has(row));
  }

  /** Keep the address in step, without another entry in the history. */
  address() {
    const query = new URLSearchParams();
    if (this.state.sort !== "-density") query.set("sort", this.state.sort);
    if (this.state.words.trim()) query.set("q", this.state.words.trim());
    for (const [name, text] of this.state.bounds) query.set(name, text);
    const standard = this.source.meta.columns.filter(({ shown }) => shown).map(({ name }) => name).join();
    const shown = this.state.columns.map(({ name }) => name).join();
    if (shown !== standard) query.set("show", shown);
    const text = query.toString();
    this.query = text;
    if (location.hash.startsWith("#/latents")) history.replaceState(null, "", `#/latents${text ? `?${text}` : ""}`);
  }

  shown() {
    this.watch = new ResizeObserver(() => this.draw());
    this.watch.observe(this.grid);
    if (remembered.query === this.query) this.grid.scrollTop = remembered.top;
    this.draw(true);
  }

  leave() {
    Object.assign(remembered, { query: this.query, top: this.grid.scrollTop });
    this.watch?.disconnect();
  }

  /** Put the rows in sight on the sheet. */
  async draw(anew = false) {
    const { columns } = this.state;
    this.sheet.style.height = `${Math.max(1, this.rows.length) * HEIGHT}px`;
    this.grid.setAttribute("aria-rowcount", this.rows.length + 1);
    if (!this.rows.length) {
      replace(this.sheet, h("p.empty", {}, this.error ?? "No latent is like that."));
      return;
    }
    const first = Math.max(0, Math.floor(this.grid.scrollTop / HEIGHT) - SPARE);
    const last = Math.min(this.rows.length, Math.ceil((this.grid.scrollTop + this.grid.clientHeight) / HEIGHT) + SPARE);
    const wanted = `${first} ${last}`;
    if (!anew && wanted === this.drawn) return;
    this.drawn = wanted;
    const values = await Promise.all(columns.map(({ name }) => this.source.column(name)));
    if (this.drawn !== wanted) return;
    const focused = this.sheet.contains(document.activeElement);
    const template = this.template();
    const rows = [];
    for (let place = first; place < last; place += 1) rows.push(this.row(place, values, template));
    replace(this.sheet, rows);
    if (focused) this.sheet.querySelector('[tabindex="0"]')?.focus({ preventScroll: true });
    this.names(rows);
  }

  row(place, values, template) {
    const index = this.rows[place];
    const cells = this.state.columns.map(({ kind }, column) => {
      const value = values[column][index];
      return h("div.figure", { role: "gridcell" },
        kind === "count" ? count(value) : kind === "share" ? share(value) : figure(value));
    });
    const name = h("div.names", { role: "gridcell" });
    const row = h("a", {
      role: "row", href: `#/latent/${index}`, tabindex: place === this.active ? "0" : "-1", "aria-rowindex": place + 2,
      onfocus: () => { this.active = place; },
    }, h("div.first", { role: "rowheader" }, String(index)), cells, name);
    row.style.top = `${place * HEIGHT}px`;
    row.style.gridTemplateColumns = template;
    row.index = index;
    row.place = place;
    return row;
  }

  /** Names and tokens come for whole blocks of latents, so after the numbers. */
  async names(rows) {
    const { block } = this.source.meta;
    for (const row of rows) {
      this.source.rows(Math.floor(row.index / block)).then((found) => {
        const [name, tokens] = found[String(row.index)] ?? [null, []];
        replace(row.querySelector(".names"), name && h("span", {}, name, " "),
          tokens.map((token) => [chip(token), " "]));
      }).catch(() => {});
    }
  }

  keys(event) {
    const row = event.target.closest?.(".sheet > a");
    if (!row) return;
    const page = Math.max(1, Math.floor(this.grid.clientHeight / HEIGHT) - 3);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation();
    this.active = Math.max(0, Math.min(this.rows.length - 1, row.place + moves[event.key]));
    const head = this.top.offsetHeight;
    const [top, bottom] = [this.active * HEIGHT, (this.active + 1) * HEIGHT];
    if (top < this.grid.scrollTop) this.grid.scrollTop = top;
    const end = bottom + head - this.grid.clientHeight;
    if (end > this.grid.scrollTop) this.grid.scrollTop = end;
    this.draw(true);
  }
}
