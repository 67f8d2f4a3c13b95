// How numbers are written, everywhere the same.

const COUNT = new Intl.NumberFormat("en");

/** An integer with separators. */
export function count(value) {
  return COUNT.format(value);
}

/** Four significant digits at most, without an exponent where it reads well without. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return power(value, digits - 1);
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

/** The same with every digit, so that figures below one another line up. */
export function figure(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size === 0 || size >= 1e4 || size < 1e-3) return number(value, digits);
  return value.toPrecision(digits).replace("-", "−");
}

/** A share of one as a percentage, small ones as 1 in so many. */
export function share(value) {
  if (value === 0) return "never";
  if (value < 0.0001) return `1 in ${COUNT.format(Number((1 / value).toPrecision(2)))}`;
  return `${figure(value * 100)} %`;
}

/** 1.2 × 10⁻⁵ */
function power(value, digits) {
  const [mantissa, exponent] = value.toExponential(digits).split("e");
  const raised = [...String(Number(exponent))].map((digit) => (digit === "-" ? "⁻"
        : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(digit)])).join("");
  return `${Number(mantissa)}×10${raised}`.replace(/^-/, "−");
}

/** 1.2k, 3.4M: for axes. */
export function brief(value) {
  if (value >= 1e9) return `${Number((value / 1e9).toPrecision(2))}G`;
  if (value >= 1e6) return `${Number((value / 1e6).toPrecision(2))}M`;
  if (value >= 1e3) return `${Number((value / 1e3).toPrecision(2))}k`;
  return number(value, 2);
}

// What has no glyph of its own, or turns the line about it: shown as a picture of it.
const PICTURES = new Map([["\n", "↵"], ["\t", "⇥"], ["\u00a0", "⍽"]]);

/** `text` with control, zero-width and direction marks made visible; what is shown is never empty. */
export function visible(text) {
  const shown = [...text].map((sign) => PICTURES.get(sign) ?? (hidden(sign) ? picture(sign) : sign)).join("");
  return shown === "" ? "∅" : shown;
}

function hidden(sign) {
  return /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/u.test(sign) && sign !== "\u200d"; // the joiner holds an emoji together
}

function picture(sign) {
  const code = sign.codePointAt(0);
  const digits = code.toString(16).toUpperCase();
  return code < 256 ? `<0x${digits.padStart(2, "0")}>` : `<U+${digits.padStart(4, "0")}>`;
}

/** A token by itself, in a list or a sentence: its spaces are visible too, many of them as their number. */
export function quoted(text) {
  return visible(text).replace(/ {4,}/g, (run) => `␣×${run.length}`).replaceAll(" ", "␣");
}
