// Building blocks for views. Text only ever becomes text nodes: nothing here takes markup.

export const byId = (id) => document.getElementById(id);

/** An element. `on` are listeners, `data` data attributes, `class` its class; everything else is an attribute. */
export function el(tag, {on = {}, data = {}, ...attributes} = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  for (const [name, value] of Object.entries(data)) node.dataset[name] = value;
  for (const [name, listener] of Object.entries(on)) node.addEventListener(name, listener);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const icon = (name) => svg("svg", {class: "icon", "aria-hidden": "true"}, svg("use", {href: `#i-${name}`}));

/** Tells a screen reader what happened, once and in words. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** Shows a text in a notice, or hides it if there is none. */
export function notice(node, ...content) {
  node.hidden = content.length === 0 || content[0] === "";
  node.replaceChildren(...(node.hidden ? [] : content));
}

/** Texts for a notice, each in a line of its own. */
export const lines = (texts) => texts.map((text) => el("span", {class: "line"}, text));

export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Pages that came over plain http from another machine have no clipboard object.
  const field = el("textarea", {class: "visually-hidden", readonly: true});
  field.value = text;
  (document.querySelector("dialog[open]") ?? document.body).append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

/** Makes a tab list of buttons work by mouse and by arrow keys. `onSelect` is given the chosen tab. */
export function tabList(list, onSelect) {
  const tabs = [...list.querySelectorAll("[role=tab]")];
  const select = (tab, {focus = false} = {}) => {
    for (const other of tabs) {
      other.setAttribute("aria-selected", String(other === tab));
      other.tabIndex = other === tab ? 0 : -1;
    }
    if (focus) tab.focus();
    onSelect(tab);
  };
  list.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (tab) select(tab);
  });
  list.addEventListener("keydown", (event) => {
    const at = tabs.indexOf(document.activeElement);
    const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1}[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    select(tabs[(to + tabs.length) % tabs.length], {focus: true});
  });
  return select;
}
