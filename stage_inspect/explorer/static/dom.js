// Elements without markup: every string becomes a text node, so nothing that comes from data is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `tag` may carry classes ("div.card.wide"); a prop is an attribute, `onclick` and the like a listener. */
export function h(tag, props, ...children) {
  return fill(document.createElement(tag.split(".")[0]), tag, props, children);
}

/** The same for SVG. */
export function s(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag.split(".")[0]), tag, props, children);
}

function fill(element, tag, props, children) {
  const classes = tag.split(".").slice(1);
  if (classes.length) element.classList.add(...classes);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (name === "class") element.classList.add(...value.split(" "));
    else element.setAttribute(name, value === true ? "" : value);
  }
  append(element, children);
  return element;
}

/** Append strings, numbers, elements, or lists of them; null and false are nothing. */
export function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
}

/** Put `children` in place of all that is in `element`. */
export function replace(element, ...children) {
  element.replaceChildren();
  append(element, children);
}

/** Call `run` once the calls have stopped coming for `milliseconds`. */
export function afterwards(run, milliseconds) {
  let timer = 0;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => run(...args), milliseconds);
  };
}

/** One of a few choices, as buttons that behave as radio buttons do; `choose` gets the value. */
export function choice(label, options, chosen, choose) {
  const buttons = options.map(([value, text, hint]) =>
    h("button", {
      type: "button", role: "radio", title: hint, "aria-checked": String(value === chosen),
      tabindex: value === chosen ? "0" : "-1", onclick: () => pick(value),
    }, text));
  const group = h("div.choice", { role: "radiogroup", "aria-label": label, onkeydown: move }, buttons);
  function pick(value) {
    options.forEach(([other], index) => {
      buttons[index].setAttribute("aria-checked", String(other === value));
      buttons[index].tabIndex = other === value ? 0 : -1;
    });
    choose(value);
  }
  function move(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const next = (buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length;
    buttons[next].focus();
    pick(options[next][0]);
  }
  return group;
}
