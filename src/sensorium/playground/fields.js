// The fields of the settings: how each looks and what it puts into a request.

import {byId, el} from "./dom.js";
import {say, t} from "./i18n.js";

/** What a person wrote into a field that cannot be sent. */
export class FieldError extends Error {
  constructor(param, message) {
    super(message);
    this.param = param;
  }
}

/** Sampling. A field is named as the API names it, so that errors find it. */
export const SAMPLING = [
  {name: "max_tokens", value: "1024", read: number},
  {name: "temperature", placeholder: "0 … 2", read: number},
  {name: "top_p", placeholder: "0 … 1", read: number},
  {name: "top_k", read: number},
  {name: "min_p", placeholder: "0 … 1", read: number},
  {name: "seed", read: number},
  {name: "presence_penalty", placeholder: "−2 … 2", read: number},
  {name: "frequency_penalty", placeholder: "−2 … 2", read: number},
  {name: "repetition_penalty", placeholder: "1", read: number},
  {name: "stop", read: (value) => value.split("|"), inputmode: "text"},
];

/** Tools, the form of the answer, reasoning. `schema` is a part of `response_format`. */
export const FORM = [
  {name: "tools", tag: "textarea", rows: 4, placeholder: '[{"type": "function", …}]', read: tools},
  {name: "tool_choice", options: ["auto", "required", "none"], read: String},
  {name: "response_format", options: ["json_object", "json_schema"], translated: true, read: String},
  {name: "schema", tag: "textarea", rows: 5, value: '{\n  "type": "object"\n}', read: schema},
  {name: "reasoning_effort", options: ["none", "low", "medium", "high"], read: String},
];

/** A tool to begin with. */
export const EXAMPLE_TOOLS = JSON.stringify([{
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather in a city.",
    parameters: {type: "object", properties: {city: {type: "string"}}, required: ["city"]},
  },
}], null, 2);

function number(value, name) {
  if (!Number.isFinite(Number(value))) throw new FieldError(name, t("error.number"));
  return Number(value);
}

function json(value, name) {
  try {
    return JSON.parse(value);
  } catch (error) {
    throw new FieldError(name, t("error.json", {reason: error.message}));
  }
}

function tools(value, name) {
  const found = json(value, name);
  if (!Array.isArray(found) || !found.length) throw new FieldError(name, t("error.tools"));
  return found;
}

function schema(value, name) {
  const found = json(value, name);
  const isObject = found !== null && typeof found === "object" && !Array.isArray(found);
  if (!isObject) throw new FieldError(name, t("error.schema"));
  return found;
}

/** What a form's tools, answer form and reasoning put into a request, of the values that are not empty. */
export function formFields({tools, tool_choice, response_format, schema, reasoning_effort}) {
  const found = {tools, tool_choice: tools && tool_choice, reasoning_effort};
  if (response_format === "json_object") found.response_format = {type: response_format};
  if (response_format === "json_schema") {
    found.response_format = {type: response_format, json_schema: {name: "answer", schema: schema ?? {}}};
  }
  return Object.fromEntries(Object.entries(found).filter(([, value]) => value !== undefined));
}

/** A field with its label and a place for its error. */
export function fieldNode(field) {
  const id = `field-${field.name}`;
  return el("div", {class: "field", data: {field: field.name}}, say(el("label", {for: id}), `settings.${field.name}`),
            inputOf(field, {id, name: field.name, "aria-describedby": `${id}-error`}),
            el("p", {id: `${id}-error`, class: "field-error", hidden: true}));
}

function inputOf({name, value = "", tag, rows, placeholder = "", inputmode = "decimal", options, translated}, shared) {
  if (options) {
    const option = (choice) => el("option", {value: choice}, choice);
    const said = (choice) => say(option(choice), `settings.${name}.${choice}`);
    return el("select", shared, say(el("option", {value: ""}), `settings.${name}.unset`),
              ...options.map(translated ? said : option));
  }
  if (tag) return el(tag, {...shared, rows, placeholder, spellcheck: "false"}, value);
  return el("input", {...shared, value, placeholder, inputmode, autocomplete: "off"});
}

export const errorPlace = (input) => byId(`${input.id}-error`);
