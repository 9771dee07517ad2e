// The third tab: what the server holds and how busy it is, read from /metrics while somebody looks.

import * as api from "./api.js";
import {byId, el, notice} from "./dom.js";
import {number, onLanguage, say, t} from "./i18n.js";
import {parse, Reading} from "./metrics.js";
import * as models from "./models.js";
import {bytes} from "./models.js";
import {createPlot} from "./plot.js";
import * as store from "./store.js";

const INTERVAL_MS = 2000;

const count = (value) => (Number.isFinite(value) ? number(value) : "–");
const percent = (value) => (Number.isFinite(value) ? `${number(100 * value, value > 0 && value < 0.1 ? 1 : 0)} %` : "–");
const seconds = (value) => (value >= 1 ? `${number(value, 2)} s` : `${number(1000 * value, value < 0.01 ? 1 : 0)} ms`);
const perSecond = (value) => `${number(value, value > 0 && value < 10 ? 1 : 0)} /s`;

const TTFT = "vllm:time_to_first_token_seconds";
const GAP = "vllm:inter_token_latency_seconds";

// Title, names of the lines, how to write a value, and the values between two readings.
const PLOTS = [
  ["plot.generated", ["plot.generated"], perSecond, (now, then) => [now.rate("vllm:generation_tokens_total", then)]],
  ["plot.prompt", ["plot.prompt"], perSecond, (now, then) => [now.rate("vllm:prompt_tokens_total", then)]],
  ["plot.queue", ["plot.running", "plot.waiting"], (value) => number(value),
   (now) => [now.value("vllm:num_requests_running"), now.value("vllm:num_requests_waiting")]],
  ["plot.first", ["plot.mean", "plot.p95"], seconds, (now, then) => [now.mean(TTFT, then), now.quantile(TTFT, 0.95, then)]],
  ["plot.gap", ["plot.mean", "plot.p95"], seconds, (now, then) => [now.mean(GAP, then), now.quantile(GAP, 0.95, then)]],
  ["plot.cache", ["plot.cache"], percent, (now) => [now.value("vllm:kv_cache_usage_perc")]],
];

let plots = [];
let earlier = null;
let latest = null;
let timer = 0;
let version = "";

export function start() {
  store.watch(({model}) => {
    if (model !== latest?.shown) restart();
    models.show();
  });
  onLanguage(() => {
    showFacts();
    models.show();
    for (const plot of plots) plot.show();
    models.showPlot();
  });
  document.addEventListener("visibilitychange", () => look(!byId("server").hidden));
}

/** Read the metrics from now on, or not any more. */
export function look(wanted) {
  clearTimeout(timer);
  if (wanted && !document.hidden) tick(true);
}

function restart() {
  earlier = latest = null;
  plots = PLOTS.map(([name, series, format]) => createPlot(name, series, format));
  byId("plots").replaceChildren(...plots.map((plot) => plot.node));
}

/** One reading. Only the first one asks for a key: nobody wants to be asked every two seconds. */
async function tick(first) {
  try {
    version ||= await api.version({quiet: !first});
    const text = await api.metrics({quiet: !first});
    take(parse(text));
    await models.refresh();
    notice(byId("server-notice"));
    byId("docs-link").hidden = Boolean(api.key.get());  // a link cannot bring the key
  } catch (error) {
    notice(byId("server-notice"), error.message);
    if (error.status === 401) return;
  }
  clearTimeout(timer);
  if (!byId("server").hidden && !document.hidden) timer = setTimeout(tick, INTERVAL_MS, false);
}

function take(families) {
  const {model} = store.get();
  const root = store.model()?.root ?? model;
  earlier = latest;
  latest = new Reading(families, root, performance.now());
  latest.shown = model;
  if (earlier) plots.forEach((plot, place) => plot.push(PLOTS[place][3](latest, earlier)));
  models.pushMemory(families);
  showFacts();
  models.show();
}

function showFacts() {
  if (!latest) return;
  const value = (name) => latest.value(name);
  const rows = [
    ["fact.state", t(`phase.${store.get().phase}`)],
    ["fact.version", version],
    ["fact.weights", bytes(value("sensorium:weight_bytes"))],
    ["fact.kv", bytes(value("sensorium:kv_cache_bytes"))],
    ["fact.kv.used", percent(value("vllm:kv_cache_usage_perc"))],
    ["fact.encoder", bytes(value("sensorium:encoder_cache_bytes"))],
    ["fact.running", count(value("vllm:num_requests_running"))],
    ["fact.waiting", count(value("vllm:num_requests_waiting"))],
    ["fact.prefix", percent(latest.share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"))],
    ["fact.media", percent(latest.share("vllm:mm_cache_hits_total", "vllm:mm_cache_queries_total"))],
    ["fact.generated", count(value("vllm:generation_tokens_total"))],
    ["fact.load", Number.isFinite(value("sensorium:load_seconds")) ? seconds(value("sensorium:load_seconds")) : "–"],
  ];
  byId("facts").replaceChildren(...rows.map(([name, shown]) =>
    el("div", {data: {fact: name}}, say(el("dt"), name), el("dd", {}, shown))));
}
