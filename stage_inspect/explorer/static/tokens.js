// Text with one colour per token. A value shows four ways: colour, the bar under the token, on hover or focus, and read
// aloud as the arrow keys walk through the tokens.

import { append, h, replace } from "./dom.js";
import { figure, quoted, visible } from "./format.js";

let tip = null;

/**
 * One line of text. `example` has `pieces` (a string per token; an empty one belongs to a character that an earlier
 * token began), `at` and `a` (the tokens that fired, and how strongly), `peak`, `special`; `scale` is the value of full
 * colour.
 */
export function tokenLine(example, scale, describe) {
  const { pieces, at, a, peak, special = [] } = example;
  const values = new Map(at.map((offset, index) => [offset, a[index]]));
  const spans = [];
  for (let first = 0; first < pieces.length; ) {
    let next = first + 1;
    while (next < pieces.length && pieces[next] === "") next += 1;
    spans.push(token(pieces[first], first, next, values, peak, special.includes(first), scale));
    first = next;
  }
  const line = h("div.tokens", {
    tabindex: "0", role: "group", "aria-roledescription": "text, arrow keys read token by token",
    "aria-label": describe, onkeydown: walk, onblur: hide, onmouseover: over, onmouseleave: hide, onclick: over,
  }, spans);
  line.example = example;
  return line;
}

function token(piece, first, next, values, peak, special, scale) {
  let value = 0;
  for (let offset = first; offset < next; offset += 1) {
    if (Math.abs(values.get(offset) ?? 0) > Math.abs(value)) value = values.get(offset);
  }
  const strength = Math.min(1, Math.abs(value) / scale);
  const holdsPeak = peak >= first && peak < next;
  const names = ["t", value && "on", strength > 0.55 && "high", value < 0 && "below", holdsPeak && "peak",
    special && "special"];
  const span = h("span", { class: names.filter(Boolean).join(" "), "--a": value ? strength.toFixed(3) : null });
  span.first = first;
  span.next = next;
  span.values = values;
  append(span, laidOut(piece));
  return span;
}

/** The text of a token such that a style can show it in one flow, or with its own line breaks and indentation. */
function laidOut(piece) {
  return piece.split(/(\n| {2,})/).filter((part) => part !== "").map((part) => {
    if (part === "\n") return [h("span.break", {}, "↵"), h("span.newline", {}, "\n")];
    return part.startsWith("  ") ? h("span.indent", {}, part) : visible(part);
  });
}

function over(event) {
  const span = event.target.closest?.(".t");
  if (span) show(span);
}

function walk(event) {
  const spans = [...event.currentTarget.querySelectorAll(":scope > .t")];
  const current = spans.findIndex((span) => span.classList.contains("here"));
  const places = {
    ArrowRight: current + 1, ArrowLeft: current < 0 ? spans.length - 1 : current - 1,
    Home: 0, End: spans.length - 1,
  };
  if (event.key === "Escape") hide();
  if (!(event.key in places)) return;
  event.preventDefault();
  event.stopPropagation();
  show(spans[Math.max(0, Math.min(spans.length - 1, places[event.key]))]);
}

/** Say what a token is and how strongly it fired, above it. */
function show(span) {
  hide();
  span.classList.add("here");
  const { example } = span.parentElement;
  const pieces = example.pieces.slice(span.first, span.next);
  const parts = [];
  for (let offset = span.first; offset < span.next; offset += 1) parts.push(span.values.has(offset)
      ? figure(span.values.get(offset)) : "0");
  const place = example.start === undefined ? null : `token ${example.start + span.first}`;
  show_tip(span, [
    h("b", {}, quoted(pieces.join(""))), " ", h("span.value", {}, parts.join(" + ")),
    place && h("span.dim", {}, ` · ${place}`),
  ]);
}

/** A note above or below an element, which a screen reader reads. */
export function show_tip(anchor, content) {
  if (!tip) {
    tip = h("div.tip", { role: "status", "aria-live": "polite" });
    document.body.append(tip);
  }
  replace(tip, content);
  tip.classList.add("shown");
  const box = (anchor.getClientRects?.()[0]) ?? anchor.getBoundingClientRect();
  const left = Math.max(8,
    Math.min(box.left + box.width / 2 - tip.offsetWidth / 2,
      document.documentElement.clientWidth - tip.offsetWidth - 8));
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${(above > 4 ? above : box.bottom + 6) + window.scrollY}px`;
}

/** Take the note away. */
export function hide() {
  document.querySelectorAll(".t.here").forEach((span) => span.classList.remove("here"));
  tip?.classList.remove("shown");
}

/** A token on its own, in a list. */
export function chip(text) {
  return h("code.chip", {}, quoted(text));
}
