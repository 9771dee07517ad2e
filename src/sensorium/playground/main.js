// Starts the page: tabs, language, theme, the key, and the list of models.

import * as api from "./api.js";
import * as chat from "./chat.js";
import * as compare from "./compare.js";
import {askForKey} from "./dialogs.js";
import {byId, el, notice, tabList} from "./dom.js";
import {current, setLanguage, t, translate} from "./i18n.js";
import * as server from "./server.js";
import * as store from "./store.js";

const TABS = ["chat", "compare", "server"];
const RETRY_MS = 1500;

function startTabs() {
  const select = tabList(document.querySelector("header [role=tablist]"), (tab) => {
    const chosen = tab.getAttribute("aria-controls");
    for (const name of TABS) byId(name).hidden = name !== chosen;
    // Not while the page loads: a browser that finds a place named there takes the focus away to it.
    if (document.readyState === "complete") history.replaceState(null, "", `#${chosen}`);
    server.look(chosen === "server");
  });
  const named = () => byId(`tab-${TABS.find((name) => location.hash === `#${name}`)}`);
  addEventListener("hashchange", () => {
    if (named()) select(named());
  });
  select(named() ?? byId("tab-chat"));
}

function startTheme() {
  const root = document.documentElement;
  byId("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("sensorium-theme", root.dataset.theme);
  });
}

function startKey() {
  api.onKeyNeeded(async (reason) => {
    const given = await askForKey(reason);
    byId("key").hidden = !given && !api.key.get();
    return given;
  });
  byId("key").hidden = !api.key.get();
  byId("key").addEventListener("click", async () => {
    const given = await askForKey("");
    if (!given) return;
    api.key.set(given);
    loadModels();
  });
}

/** Ask until the server answers: it may still be loading its model. */
async function loadModels() {
  try {
    const models = await api.models();
    const kept = models.find((entry) => entry.id === store.get().model) ?? models[0];
    store.set({models, model: kept.id, phase: "ready"});
    notice(byId("banner"));
  } catch (error) {
    const phase = error.status === 503 ? "loading" : error.status === 401 ? "locked" : "unreachable";
    store.set({phase});
    if (phase === "locked") {
      const again = el("button", {type: "button", on: {click: loadModels}}, t("key.enter"));
      notice(byId("banner"), t("phase.locked"), " ", again);
      return;
    }
    notice(byId("banner"), error.message);
    setTimeout(loadModels, RETRY_MS);
  }
}

function startModels() {
  const choice = byId("model");
  choice.addEventListener("change", () => store.set({model: choice.value}));
  store.watch(({models, model}) => {
    choice.replaceChildren(...models.map((entry) => el("option", {value: entry.id}, entry.id)));
    choice.value = model;
    choice.disabled = models.length === 0;
  });
}

translate();
byId("language").addEventListener("click", () => setLanguage(current() === "en" ? "zh" : "en"));
startTheme();
startKey();
startModels();
chat.start();
compare.start();
server.start();
startTabs();
// Whoever uses a finger would get a keyboard over half of the page.
if (!byId("chat").hidden && !matchMedia("(pointer: coarse)").matches) byId("text").focus();
loadModels();
