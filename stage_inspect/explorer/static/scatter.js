// Points on a canvas, a quarter of a million of them, each within reach of mouse, finger and keyboard.

import { h } from "./dom.js";
import { decade, linearTicks, logTicks } from "./chart.js";
import { number } from "./format.js";
import { hide, show_tip } from "./tokens.js";

const REACH = 14;

/**
 * A scatter plot of `indices` at x[index], y[index]. `tell` gives the sentence on one point; choosing a point opens its
 * latent. Without labels there are no axes.
 */
export function scatter({ label, indices, x, y, xLabel, yLabel, logarithmic = false, tell, ratio = 0.58,
    marked = [] }) {
  const canvas = h("canvas",
    { tabindex: "0", role: "application", "aria-roledescription": "scatter plot",
      "aria-label": `${label}. Arrow keys go from point to point, Enter opens one.` });
  const box = h("div.plot", {}, canvas);
  const spot = h("span.spot", { "aria-hidden": "true" });
  box.append(spot);
  const place = logarithmic ? Math.log10 : (value) => value;
  const shown = logarithmic ? indices.filter((index) => x[index] > 0 && y[index] > 0) : indices;
  const [xs, ys] = [x, y].map((column) => Float32Array.from(shown, (index) => place(column[index])));
  const [xLow, xHigh] = extent(xs);
  const [yLow, yHigh] = extent(ys);
  const pad = xLabel ? { left: 52, right: 12, top: 10, bottom: 40 } : { left: 8, right: 8, top: 8, bottom: 8 };
  const special = new Set(marked);
  let byX = null;
  let current = -1;
  let width = 0;
  let height = 0;

  const px = (value) => pad.left + ((value - xLow) / (xHigh - xLow)) * (width - pad.left - pad.right);
  const py = (value) => pad.top + (1 - (value - yLow) / (yHigh - yLow)) * (height - pad.top - pad.bottom);

  function draw() {
    width = box.clientWidth;
    if (!width) return;
    height = Math.round(Math.min(620, Math.max(240, width * ratio)));
    const scale = window.devicePixelRatio || 1;
    canvas.width = width * scale;
    canvas.height = height * scale;
    canvas.style.height = `${height}px`;
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(name).trim();
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    if (xLabel) axes(pen, colour, style.fontFamily);
    pen.fillStyle = colour("--dot");
    pen.globalAlpha = Math.max(0.12, Math.min(0.75, 900 / shown.length + 0.1));
    const size = shown.length > 20000 ? 2 : 3;
    for (let point = 0; point < shown.length; point += 1) pen.fillRect(px(xs[point]) - size / 2,
      py(ys[point]) - size / 2, size, size);
    pen.globalAlpha = 1;
    pen.fillStyle = colour("--fire-edge");
    for (let point = 0; point < shown.length; point += 1) {
      if (!special.has(shown[point])) continue;
      pen.beginPath();
      pen.arc(px(xs[point]), py(ys[point]), 4.5, 0, 2 * Math.PI);
      pen.fill();
    }
  }

  function axes(pen, colour, font) {
    pen.strokeStyle = colour("--line");
    pen.fillStyle = colour("--muted");
    pen.font = `11px ${font}`;
    pen.lineWidth = 1;
    const ticks = (low, high) => (logarithmic ? logTicks(low, high) : linearTicks(low, high));
    const name = logarithmic ? decade : (value) => number(value);
    pen.textAlign = "center";
    for (const value of ticks(xLow, xHigh)) {
      const at = Math.round(px(place(value))) + 0.5;
      line(pen, at, pad.top, at, height - pad.bottom);
      pen.fillText(name(value), at, height - pad.bottom + 15);
    }
    pen.fillText(xLabel, (pad.left + width - pad.right) / 2, height - 6);
    pen.textAlign = "right";
    for (const value of ticks(yLow, yHigh)) {
      const at = Math.round(py(place(value))) + 0.5;
      line(pen, pad.left, at, width - pad.right, at);
      pen.fillText(name(value), pad.left - 6, at + 4);
    }
    pen.save();
    pen.translate(11, (pad.top + height - pad.bottom) / 2);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    pen.fillText(yLabel, 0, 0);
    pen.restore();
  }

  function nearest(atX, atY, reach) {
    let found = -1;
    let least = reach * reach;
    for (let point = 0; point < shown.length; point += 1) {
      const distance = (px(xs[point]) - atX) ** 2 + (py(ys[point]) - atY) ** 2;
      if (distance < least) [found, least] = [point, distance];
    }
    return found;
  }

  function choose(point) {
    current = point;
    spot.classList.toggle("shown", point >= 0);
    if (point < 0) return hide();
    spot.style.left = `${px(xs[point])}px`;
    spot.style.top = `${py(ys[point])}px`;
    show_tip(spot, [tell(shown[point])]);
  }

  const at = (event) => {
    const rect = canvas.getBoundingClientRect();
    return nearest(event.clientX - rect.left, event.clientY - rect.top, REACH);
  };
  const go = () => { if (current >= 0) location.hash = `#/latent/${shown[current]}`; };
  canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && choose(at(event)));
  canvas.addEventListener("pointerleave", () => document.activeElement !== canvas && choose(-1));
  canvas.addEventListener("click", (event) => { choose(at(event)); go(); });
  canvas.addEventListener("blur", () => choose(-1));
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Enter") go();
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowUp: 10, ArrowDown: -10 }[event.key];
    if (!step || !shown.length) return;
    event.preventDefault();
    event.stopPropagation();
    byX ??= Uint32Array.from(shown, (_, point) => point).sort((one, other) => xs[one] - xs[other]);
    const rank = current < 0 ? -1 : byX.indexOf(current);
    choose(byX[Math.max(0, Math.min(byX.length - 1, rank < 0 ? 0 : rank + step))]);
  });
  new ResizeObserver(draw).observe(box);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  return box;
}

function line(pen, fromX, fromY, toX, toY) {
  pen.beginPath();
  pen.moveTo(fromX, fromY);
  pen.lineTo(toX, toY);
  pen.stroke();
}

/** Least and largest with a little room. */
function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  const room = (high - low || 1) * 0.03;
  return [low - room, high + room];
}
