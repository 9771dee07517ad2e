// The page's language. Elements name their text (`data-i18n`), so that a change of language finds all of them again.

import {words} from "./words.js";

const CHOICE = "sensorium-language";
const values = new WeakMap();  // element -> what its text is filled with
let language = pick();

function pick() {
  const chosen = localStorage.getItem(CHOICE);
  if (chosen in words) return chosen;
  return navigator.languages.some((name) => name.startsWith("en")) || !navigator.languages[0]?.startsWith("zh")
    ? "en" : "zh";
}

export const current = () => language;

/** The text of that name, its {places} filled. */
export function t(name, filled = {}) {
  const text = words[language][name] ?? words.en[name] ?? name;
  return text.replace(/\{(\w+)\}/g, (_, place) => String(filled[place] ?? ""));
}

/** Gives an element a text that follows the language. */
export function say(node, name, filled = {}) {
  node.dataset.i18n = name;
  values.set(node, filled);
  node.textContent = t(name, filled);
  return node;
}

/** The same for a button that shows only an icon: what it does, for pointers and for screen readers. */
export function title(node, name) {
  node.dataset.i18nTitle = name;
  node.title = t(name);
  node.setAttribute("aria-label", t(name));
  return node;
}

export function number(value, digits = 0) {
  return value.toLocaleString(language, {minimumFractionDigits: digits, maximumFractionDigits: digits});
}

const listeners = new Set();

/** Calls `listener` after every change of language. */
export const onLanguage = (listener) => listeners.add(listener);

export function setLanguage(name) {
  language = name;
  localStorage.setItem(CHOICE, name);
  translate();
  for (const listener of listeners) listener();
}

export function translate() {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  for (const node of document.querySelectorAll("[data-i18n]")) {
    node.textContent = t(node.dataset.i18n, values.get(node));
  }
  for (const node of document.querySelectorAll("[data-i18n-title]")) title(node, node.dataset.i18nTitle);
  for (const node of document.querySelectorAll("[data-i18n-label]")) {
    node.setAttribute("aria-label", t(node.dataset.i18nLabel));
  }
  for (const node of document.querySelectorAll("[data-i18n-placeholder]")) {
    node.placeholder = t(node.dataset.i18nPlaceholder);
  }
}
