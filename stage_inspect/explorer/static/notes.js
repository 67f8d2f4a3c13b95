// What readers write down: a note on a latent, and lists of latents, kept in the latents folder.

import { h, replace } from "./dom.js";

export const STARRED = "starred";

/** The note on a latent; without a server it is only shown. */
export function notesPanel(source, latent) {
  const index = latent.latent;
  const told = h("span.dim", { role: "status" });
  const text = h("textarea",
    { rows: "3", placeholder: "A name for it, or what you found", "aria-label": "Note", maxlength: "2000" },
      latent.note ?? "");
  const save = async (event) => {
    event.preventDefault();
    try {
      await source.ask(`note/${index}`, { text: text.value });
      source.forget(`latent/${index}.json`);
      source.forget(`rows/${Math.floor(index / source.meta.block)}.json`);
      replace(told, "Saved");
    } catch (error) {
      replace(told, error.message);
    }
  };
  const form = source.meta.writable && h("form.stack", { onsubmit: save }, text,
    h("div.row", {}, h("button", {}, "Save the note"), told));
  const labels = latent.labels.map((label) => [h("span.label-chip", {}, label), " "]);
  if (!form && !labels.length && !latent.note) return null;
  return h("section.panel", {}, h("h2", {}, "Notes"), labels.length > 0 && h("p.told", {}, labels),
    form || (latent.note && h("p", {}, latent.note)));
}

/** A button that puts a latent on the list of starred ones, or takes it off. */
export function starButton(source, index) {
  const button = h("button.star",
    { type: "button", "aria-pressed": "false", title: "Put it on the list of starred latents" }, "Star");
  source.ask("lists").then(({ lists }) => button.setAttribute("aria-pressed",
      String(lists[STARRED]?.includes(index) ?? false))).catch(() => {});
  button.addEventListener("click", async () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    try {
      await source.ask("lists", { list: STARRED, latent: index, on });
      button.setAttribute("aria-pressed", String(on));
    } catch (error) {
      button.title = error.message;
    }
  });
  return button;
}
