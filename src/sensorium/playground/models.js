// The table of the third tab: what is served, in which state, with what memory; buttons that load and unload.

import * as api from "./api.js";
import {byId, el, notice} from "./dom.js";
import {number, say, t} from "./i18n.js";
import {createPlot} from "./plot.js";
import * as store from "./store.js";

const HEAD = ["models.name", "models.state", "models.memory", "models.context", "models.input", "models.tasks"];
const RESIDENT = "sensorium:model_resident_bytes";
const busy = new Set();  // names of models that a button is at work on

let plot = null;
let plotted = "";

export const bytes = (value) => {
  if (!Number.isFinite(value)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(value || 1) / 3)));
  return `${number(value / 1000 ** power, power > 2 ? 2 : power ? 1 : 0)} ${units[power]}`;
};

/** Read the list again; views hear of it if anything has changed. */
export async function refresh() {
  const models = await api.models({quiet: true});
  if (JSON.stringify(models) !== JSON.stringify(store.get().models)) store.set({models});
}

export function show() {
  byId("models").replaceChildren(
    el("thead", {}, el("tr", {}, ...HEAD.map((name) => say(el("th", {scope: "col"}), name)), el("td"))),
    el("tbody", {}, ...store.get().models.map(row)));
}

function row(model) {
  const {memory} = model;
  return el("tr", {data: {model: model.id}}, el("th", {scope: "row"}, model.id),
            el("td", {title: model.error}, state(model)),
            el("td", {}, memory ? bytes(memory.resident || memory.weights + memory.kv_cache) : "–"),
            el("td", {}, Number.isFinite(model.max_model_len) ? number(model.max_model_len) : "–"),
            el("td", {}, (model.modalities ?? []).map((kind) => t(`kind.${kind}`)).join(", ")),
            el("td", {}, (model.tasks ?? []).join(", ")),
            el("td", {}, model.id === model.root && store.get().models.length > 1 ? button(model) : null));
}

function state(model) {
  const part = model.loading?.progress ? ` ${number(100 * model.loading.progress)} %` : "";
  return (model.state ? t(`state.${model.state}`) : t("state.ready")) + part;
}

function button(model) {
  const loads = ["unloaded", "failed"].includes(model.state);
  const node = el("button", {type: "button", on: {click: () => change(model.id, loads ? "load" : "unload")},
                             disabled: busy.has(model.id) || !(loads || model.state === "ready")});
  return say(node, loads ? "models.load" : "models.unload");
}

/** Load or unload it, as an operator. What is refused is told above the table. */
async function change(name, what) {
  busy.add(name);
  show();
  try {
    await api.post(`v1/models/${what}`, {model: name});
    notice(byId("models-notice"));
  } catch (error) {
    notice(byId("models-notice"), error.message);
  }
  busy.delete(name);
  await refresh().catch(() => null);
  show();
}

/** What every model's process takes, one line each, of one reading of the metrics. */
export function pushMemory(families) {
  const rows = families.get(RESIDENT) ?? [];
  const names = rows.map(({labels}) => labels.model_name);
  if (plotted !== names.join("\n")) {
    plotted = names.join("\n");
    plot = createPlot("plot.memory", names, bytes);
    byId("memory-plot").replaceChildren(plot.node);
  }
  plot?.push(rows.map(({value}) => value || NaN));
}

export const showPlot = () => plot?.show();
