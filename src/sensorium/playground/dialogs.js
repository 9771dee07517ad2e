// The page's dialogs: the key, a URL, the request as code.

import {kindOf} from "./attachments.js";
import {announce, byId, copy, notice, tabList} from "./dom.js";
import {t} from "./i18n.js";

/** Shows a dialog; resolves to what `onSubmit` makes of it, or to null where it was closed. */
export function openDialog(dialog, onSubmit = () => true) {
  return new Promise((resolve, reject) => {
    const form = dialog.querySelector("form");
    let result = null;
    const submit = async (event) => {
      event.preventDefault();
      try {
        result = await onSubmit(form);
        dialog.close();
      } catch (error) {
        reject(error);
        dialog.close();
      }
    };
    const cancel = (event) => {
      if (event.target.closest("button[value=cancel]")) dialog.close();
    };
    form.addEventListener("submit", submit);
    form.addEventListener("click", cancel);
    dialog.addEventListener("close", () => {
      form.removeEventListener("submit", submit);
      form.removeEventListener("click", cancel);
      resolve(result);
    }, {once: true});
    dialog.showModal();
  });
}

/** The key that a person gives, or null. `reason` says what was wrong with the last one. */
export async function askForKey(reason) {
  const field = byId("key-field");
  field.value = "";
  notice(byId("key-error"), reason);
  return openDialog(byId("key-dialog"), () => field.value.trim());
}

/** {url, kind}, or null. `takes` says which kinds can be chosen. */
export async function askForUrl(takes) {
  const dialog = byId("url-dialog");
  const field = byId("url-field");
  const kinds = [...dialog.querySelectorAll("[name=kind]")];
  for (const kind of kinds) kind.disabled = !takes(kind.value);
  const choose = (value) => { for (const kind of kinds) kind.checked = kind.value === value && !kind.disabled; };
  choose(kinds.find((kind) => !kind.disabled)?.value);
  field.value = "";
  field.oninput = () => {
    const kind = URL.canParse(field.value) ? kindOf(new URL(field.value).pathname) : null;
    if (kind && takes(kind)) choose(kind);
  };
  return openDialog(dialog, () => ({url: field.value.trim(), kind: kinds.find((kind) => kind.checked)?.value ?? "image"}));
}

let shownRequest = {};
let selectForm = null;

/** Shows a request as curl, Python and JavaScript. */
export function showRequest({curl, python, javascript}) {
  const code = byId("request-code");
  shownRequest = {"request-curl": curl, "request-python": python, "request-javascript": javascript};
  selectForm ??= tabList(byId("request-dialog").querySelector("[role=tablist]"), (tab) => {
    code.textContent = shownRequest[tab.id];
    code.setAttribute("aria-labelledby", tab.id);
  });
  selectForm(byId("request-curl"));
  byId("request-copy").onclick = async () => {
    await copy(code.textContent);
    announce(t("copied"));
    flash(byId("request-copy"));
  };
  return openDialog(byId("request-dialog"));
}

/** A button that says for a moment that it has copied. */
export function flash(button) {
  const before = button.dataset.i18n;
  button.textContent = t("copied");
  setTimeout(() => { button.textContent = t(before); }, 1500);
}
