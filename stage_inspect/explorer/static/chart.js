// Small charts in SVG, their colours from the style sheet, their contents in words for screen readers.

import { h, s } from "./dom.js";
import { brief, count, figure, number } from "./format.js";
import { hide, show_tip } from "./tokens.js";


/**
 * Bars over `edges` (one more than `counts`), which lie on a logarithmic axis unless `linear`. `marks` are values to
 * tick under the axis; `choose(low, high)` is called for a bar that is clicked.
 */
export function histogram({ edges, counts, label, unit, linear = false, marks = [], width = 320, height = 130, choose,
    tone }) {
  const [pad, foot, top] = [4, 30, 8];
  const place = linear ? (value) => value : Math.log10;
  const [low, high] = [place(edges[0]), place(edges[edges.length - 1])];
  const x = (value) => pad + ((place(value) - low) / (high - low || 1)) * (width - 2 * pad);
  const most = Math.max(...counts, 1);
  const y = (value) => top + (1 - value / most) * (height - top - foot);
  const bars = counts.map((value, index) => {
    const [left, right] = [x(edges[index]), x(edges[index + 1])];
    const told = `${number(edges[index])} to ${number(edges[index + 1])}: ${count(value)} ${unit}`;
    const hit = s("rect.hit", { x: left, y: top, width: Math.max(1, right - left), height: height - top - foot });
    const bar = s("rect.bar", {
      x: left + 0.5, y: value ? Math.min(y(value), height - foot - 1.5) : height - foot, rx: 1,
      width: Math.max(0.75, right - left - 1), height: value ? Math.max(1.5, height - foot - y(value)) : 0,
    });
    return s("g", {
      class: choose ? "pick" : null, onmouseenter: (event) => show_tip(event.currentTarget, [told]), onmouseleave: hide,
      onclick: choose && (() => choose(edges[index], edges[index + 1])),
    }, hit, bar);
  });
  const base = height - foot;
  const ticks = (linear ? linearTicks(low, high) : logTicks(low, high)).map((value) =>
    s("g", {},
      s("line.tick", { x1: x(value), x2: x(value), y1: base, y2: base + 4 }),
      s("text", { x: x(value), y: base + 17, "text-anchor": anchor(x(value), width) },
        linear ? number(value) : decade(value))));
  const ticked = marks.filter((value) => linear || value > 0).map((value) =>
    s("line.mark", { x1: x(value), x2: x(value), y1: base + 1, y2: base + 6 }));
  const total = counts.reduce((sum, value) => sum + value, 0);
  const summary = `${label}: ${count(total)} ${unit} from ${number(edges[0])} to ${number(edges.at(-1))}`;
  return s("svg.chart", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": summary, class: tone },
    bars, s("line.axis", { x1: pad, x2: width - pad, y1: base, y2: base }), ticked, ticks);
}

function anchor(x, width) {
  return x < 24 ? "start" : x > width - 24 ? "end" : "middle";
}

/** Powers of ten within the decades [low, high]; where there are fewer than two, also their twos and fives. */
export function logTicks(low, high) {
  const found = [];
  const step = Math.max(1, Math.ceil((high - low) / 6));
  for (let power = Math.ceil(low - 1e-9); power <= high + 1e-9; power += step) found.push(10 ** power);
  if (found.length > 1) return found;
  const finer = [];
  for (let power = Math.floor(low); power <= high; power += 1) {
    for (const factor of [1, 2, 5]) {
      const place = Math.log10(factor) + power;
      if (place >= low - 1e-9 && place <= high + 1e-9) finer.push(factor * 10 ** power);
    }
  }
  return finer;
}

/** Four to six round values between two others. */
export function linearTicks(low, high) {
  const rough = (high - low || 1) / 5;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * size).find((value) => value >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) {
    found.push(Number(value.toPrecision(12)));
  }
  return found;
}

/** A power of ten as one, other values short. */
export function decade(value) {
  const power = Math.log10(value);
  if (Math.abs(power - Math.round(power)) > 1e-9 || (value >= 0.01 && value < 1000)) return value < 1 ? number(value,
    2) : brief(value);
  const raised = [...String(Math.round(power))].map((digit) => (digit === "-" ? "⁻"
        : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(digit)])).join("");
  return `10${raised}`;
}

/** Rows of a label and a bar for its value, a full one for `most`: the largest of them where it isn't given. */
export function barList(rows, { tone, most = Math.max(...rows.map(([, value]) => Math.abs(value)), 1e-12) } = {}) {
  return h("ol.bars", { class: tone }, rows.map(([label, value, shown]) =>
    h("li", { "--w": Math.min(1, Math.abs(value) / most).toFixed(3) }, h("span.name", {}, label),
      h("span.num", {}, shown ?? figure(value)))));
}
