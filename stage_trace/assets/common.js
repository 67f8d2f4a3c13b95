"use strict";
// Everything that comes from data enters the page as text: no markup is ever made of it.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (name, className, ...children) => {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null));
  return element;
};
const button = (text, onClick, className = "button") => {
  const element = make("button", className, text);
  element.type = "button";
  element.addEventListener("click", onClick);
  return element;
};
const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(text.trim() ? /^ | $/g : / /g, "␣") || "∅";
const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`);
const figure = (value) => (Math.abs(value) >= 1000 || (value && Math.abs(value) < 0.001) ? value.toExponential(1) : value.toFixed(3));
