// The second tab: how alike texts and images are, by their embeddings or by the model's scores.

import * as api from "./api.js";
import {preview, readFiles} from "./attachments.js";
import {contentParts, inline} from "./conversation.js";
import {showRequest} from "./dialogs.js";
import {byId, el, icon, lines, notice} from "./dom.js";
import {number, onLanguage, say, t, title} from "./i18n.js";
import {spans} from "./render.js";
import {snippets} from "./snippets.js";
import * as store from "./store.js";

const PATHS = {embed: "v1/embeddings", score: "v1/score"};

let items = [];  // {text} or {attachment}

const form = byId("compare-form");
const how = () => form.elements.how.value;

export function start() {
  items = ["compare.example.1", "compare.example.2", "compare.example.3"].map((name) => ({text: t(name)}));
  byId("add-text").addEventListener("click", () => add({text: ""}));
  byId("add-image").addEventListener("click", () => byId("compare-file").click());
  byId("compare-file").addEventListener("change", async () => {
    await addFiles([...byId("compare-file").files]);
    byId("compare-file").value = "";
  });
  const panel = byId("compare");
  panel.addEventListener("dragover", (event) => {
    if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
  });
  panel.addEventListener("drop", (event) => {
    event.preventDefault();
    addFiles([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", (event) => {
    if (panel.hidden || !event.clipboardData.files.length) return;
    event.preventDefault();
    addFiles([...event.clipboardData.files]);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  store.watch(showAbilities);
  onLanguage(showAbilities);
  showItems();
}

// Items

function add(item) {
  items.push(item);
  showItems();
  byId("items").lastElementChild.querySelector("textarea")?.focus();
}

async function addFiles(files) {
  const refused = await readFiles(files, (attachment) => add({attachment}), (kind, name) => {
    if (kind !== "image") return t("compare.images.only", {name});
    return store.takes("image") ? "" : t("attach.unsupported", {name, kind: t("kind.image")});
  });
  if (refused.length) notice(byId("compare-notice"), ...lines(refused));
}

function showItems() {
  byId("items").replaceChildren(...items.map((item, place) => el("li", {}, editor(item, place), title(
    el("button", {type: "button", class: "quiet icon-only", on: {click: () => {
      items = items.filter((other) => other !== item);
      showItems();
      byId("add-text").focus();
    }}}, icon("close")), "compare.remove"))));
}

function editor(item, place) {
  if (item.attachment) return preview(item.attachment);
  const field = el("textarea", {rows: 1, "aria-label": t("compare.item", {number: place + 1})});
  field.value = item.text;
  field.addEventListener("input", () => { item.text = field.value; });
  return field;
}

// What can be done

const abilities = () => ({embed: store.does("embed"), score: store.does("score", "embed")});
const canCompare = () => Object.values(abilities()).some(Boolean);

function showAbilities() {
  const can = abilities();
  const known = Boolean(store.model());
  for (const choice of form.elements.how) choice.disabled = !can[choice.value];
  if (known && !can[how()]) for (const choice of form.elements.how) choice.checked = can[choice.value];
  byId("compare-run").disabled = !canCompare();
  byId("add-image").disabled = !store.takes("image");
  notice(byId("compare-notice"), known && !canCompare() ? t("compare.cannot", {model: store.get().model}) : "");
}

// Comparing

/** The body for one of the two ways. Texts alone are sent as they are; with images, everything as chats. */
function body(way, compared, place = inline) {
  const {model} = store.get();
  const content = (item) => contentParts(item.text, item.attachment ? [item.attachment] : [], place);
  if (way === "score") {
    const side = (item) => (item.attachment ? {content: content(item)} : item.text);
    return {model, queries: side(compared[0]), documents: compared.slice(1).map(side)};
  }
  if (compared.every((item) => !item.attachment)) return {model, input: compared.map((item) => item.text)};
  return {model, messages: compared.map((item) => [{role: "user", content: content(item)}])};
}

async function run() {
  const way = how();
  const compared = items.filter((item) => item.attachment || item.text.trim());
  if (compared.length < 2) {
    notice(byId("compare-notice"), t("compare.two"));
    return;
  }
  notice(byId("compare-notice"));
  byId("compare-run").disabled = true;
  const startMs = performance.now();
  try {
    const answer = await api.post(PATHS[way], body(way, compared));
    const table = way === "embed" ? similarities(compared, answer) : scores(compared, answer);
    const code = say(el("button", {type: "button", on: {click: () => showRequest(snippets(
      PATHS[way], (place) => body(way, compared, place), {withKey: Boolean(api.key.get())}))}}), "turn.request");
    byId("compare-result").replaceChildren(table, facts(answer, performance.now() - startMs), code);
  } catch (error) {
    showError(error);
  } finally {
    byId("compare-run").disabled = !canCompare();
  }
}

function showError(error) {
  if (!(error instanceof api.ApiError)) console.error(error);
  byId("compare-result").replaceChildren();
  const missing = error.status === 404 || error.status === 501;
  notice(byId("compare-notice"), ...(missing ? [t("compare.cannot", {model: store.get().model})] : spans(error.message)),
         ...(error.param && !missing ? [" ", say(el("span"), "error.field"), " ", el("code", {}, error.param)] : []));
}

function facts(answer, durationMs) {
  const size = answer.data[0]?.embedding?.length;
  return el("ul", {class: "stats"},
            size ? say(el("li"), "compare.size", {size: number(size)}) : null,
            answer.usage ? say(el("li"), "compare.tokens", {tokens: number(answer.usage.prompt_tokens)}) : null,
            say(el("li"), "compare.time", {seconds: number(durationMs / 1000, 2)}));
}

export function cosine(one, other) {
  let [product, ones, others] = [0, 0, 0];
  for (let at = 0; at < one.length; at++) {
    product += one[at] * other[at];
    ones += one[at] ** 2;
    others += other[at] ** 2;
  }
  return product / Math.sqrt(ones * others || 1);
}

/** Everything against everything, by the cosine of the vectors. */
function similarities(compared, answer) {
  const vectors = [...answer.data].sort((one, other) => one.index - other.index).map((row) => row.embedding);
  const rows = compared.map((item, row) => el("tr", {}, heading(item, row, "row"), ...compared.map((_, column) =>
    bar(cosine(vectors[row], vectors[column]), {same: row === column}))));
  return tableOf("compare.caption.embed", [el("td"), ...compared.map((item, place) => heading(item, place, "col"))], rows);
}

/** The first item against the others, best first. */
function scores(compared, answer) {
  const ranked = [...answer.data].sort((one, other) => other.score - one.score);
  const most = Math.max(1, ...ranked.map((row) => Math.abs(row.score)));
  const rows = ranked.map((row) => el("tr", {}, heading(compared[row.index + 1], row.index + 1, "row"),
                                      bar(row.score, {most})));
  return tableOf("compare.caption.score", [el("td"), heading(compared[0], 0, "col")], rows);
}

const tableOf = (caption, head, rows) => el("div", {class: "scroll", tabindex: "0"}, el("table", {class: "bars"},
  say(el("caption"), caption), el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)));

function heading(item, place, scope) {
  const name = item.attachment ? preview(item.attachment) : el("span", {class: "short", title: item.text}, item.text);
  return el("th", {scope}, el("span", {class: "named"}, el("span", {class: "count"}, String(place + 1)), name));
}

/** A number and a bar as long as it is far from nothing; what is below nothing looks different. */
function bar(value, {same = false, most = 1} = {}) {
  const length = el("span", {class: value < 0 ? "length below" : "length"});
  length.style.width = `${Math.min(100, 100 * Math.abs(value) / most).toFixed(1)}%`;
  return el("td", {class: same ? "same" : ""}, el("span", {class: "value"}, number(value, 3)),
            el("span", {class: "track", "aria-hidden": "true"}, length));
}
