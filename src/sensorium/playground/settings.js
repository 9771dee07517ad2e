// The system prompt and the sampling fields. A field is named as the API names it, so that errors find it.

import {byId, el, notice} from "./dom.js";
import {say, t} from "./i18n.js";
import {spans} from "./render.js";

const FIELDS = [
  {name: "max_tokens", value: "1024", placeholder: ""},
  {name: "temperature", placeholder: "0 … 2"},
  {name: "top_p", placeholder: "0 … 1"},
  {name: "top_k", placeholder: ""},
  {name: "min_p", placeholder: "0 … 1"},
  {name: "seed", placeholder: ""},
  {name: "presence_penalty", placeholder: "−2 … 2"},
  {name: "frequency_penalty", placeholder: "−2 … 2"},
  {name: "repetition_penalty", placeholder: "1"},
  {name: "stop", placeholder: "", text: true},
];

/** What a person wrote into a field that cannot be sent. */
export class FieldError extends Error {
  constructor(param, message) {
    super(message);
    this.param = param;
  }
}

export class Settings {
  constructor(form) {
    this.form = form;
    byId("fields").replaceChildren(...FIELDS.map(field));
    form.addEventListener("input", (event) => mark(event.target, null));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => this.clearErrors());
  }

  get system() {
    return this.form.elements.system.value.trim();
  }

  /** The sampling fields of a request; empty ones are left to the model. FieldError: not a number. */
  sampling() {
    const sampling = {};
    for (const {name, text} of FIELDS) {
      const value = this.form.elements[name].value.trim();
      if (value === "") continue;
      if (text) sampling[name] = value.split("|");
      else if (Number.isFinite(Number(value))) sampling[name] = Number(value);
      else throw new FieldError(name, t("error.number"));
    }
    return sampling;
  }

  /** Shows an error at the field that it names; false where no field of this form is meant. */
  showError({param, message}) {
    const input = this.form.elements[(param ?? "").split(/[.[]/)[0]];
    if (!(input instanceof HTMLElement)) return false;
    mark(input, message);
    input.focus();
    return true;
  }

  clearErrors() {
    for (const input of this.form.elements) mark(input, null);
  }
}

function field({name, value, placeholder, text}) {
  const id = `field-${name}`;
  const input = el("input", {id, name, value, placeholder, autocomplete: "off", inputmode: text ? "text" : "decimal",
                             "aria-describedby": `${id}-error`});
  return el("div", {class: "field"}, say(el("label", {for: id}), `settings.${name}`), input,
            el("p", {id: `${id}-error`, class: "field-error", hidden: true}));
}

function mark(input, message) {
  const place = byId(`${input.id}-error`);
  if (!place) return;
  if (message) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
  notice(place, ...spans(message ?? ""));
}
