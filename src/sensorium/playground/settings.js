// The system prompt and the fields of a request.

import {byId, el, notice} from "./dom.js";
import {EXAMPLE_TOOLS, FORM, SAMPLING, errorPlace, fieldNode, formFields} from "./fields.js";
import {say} from "./i18n.js";
import {spans} from "./render.js";

export class Settings {
  constructor(form) {
    this.form = form;
    byId("fields").replaceChildren(...SAMPLING.map(fieldNode));
    byId("form-fields").replaceChildren(...FORM.map(fieldNode));
    this.offerExample();
    form.addEventListener("input", (event) => {
      mark(event.target, null);
      this.showSchema();
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => {
      this.clearErrors();
      setTimeout(() => this.showSchema());  // the event comes before the fields change
    });
    this.showSchema();
  }

  get system() {
    return this.form.elements.system.value.trim();
  }

  /** The fields of a request; empty ones are left to the model. FieldError: what cannot be sent. */
  fields() {
    const {schema, ...form} = this.read(FORM.filter(({name}) => name !== "schema" || this.hasSchema));
    return {...this.read(SAMPLING), ...formFields({...form, schema})};
  }

  read(fields) {
    const found = {};
    for (const {name, read} of fields) {
      const value = this.form.elements[name].value.trim();
      if (value !== "") found[name] = read(value, name);
    }
    return found;
  }

  get hasSchema() {
    return this.form.elements.response_format.value === "json_schema";
  }

  showSchema() {
    this.form.querySelector("[data-field=schema]").hidden = !this.hasSchema;
  }

  offerExample() {
    const {tools} = this.form.elements;
    tools.before(say(el("button", {type: "button", class: "small", id: "example-tools", on: {click: () => {
      tools.value = EXAMPLE_TOOLS;
      mark(tools, null);
      tools.focus();
    }}}), "settings.tools.example"));
  }

  /** Shows an error at the field that it names; false where no field of this form is meant. */
  showError({param, message}) {
    const [name] = (param ?? "").split(/[.[]/);
    const input = this.form.elements[name === "response_format" && this.hasSchema ? "schema" : name];
    if (!(input instanceof HTMLElement)) return false;
    mark(input, message);
    input.focus();
    return true;
  }

  clearErrors() {
    for (const input of this.form.elements) mark(input, null);
  }
}

function mark(input, message) {
  const place = errorPlace(input);
  if (!place) return;
  if (message) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
  notice(place, ...spans(message ?? ""));
}
