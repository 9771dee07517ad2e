// Images, videos and audio on their way into a request: read from files, described, shown small.

import {el, icon} from "./dom.js";
import {t, title} from "./i18n.js";

export const KINDS = ["image", "video", "audio"];
const TYPES = {
  png: "image/png", jpg: "image/jpeg", jpeg: "image/jpeg", webp: "image/webp", gif: "image/gif", bmp: "image/bmp",
  mp4: "video/mp4", m4v: "video/mp4", mov: "video/quicktime", webm: "video/webm", mkv: "video/x-matroska",
  avi: "video/x-msvideo", wav: "audio/wav", mp3: "audio/mpeg", ogg: "audio/ogg", oga: "audio/ogg", opus: "audio/ogg",
  flac: "audio/flac", m4a: "audio/mp4", aac: "audio/aac",
};

/** The media type of a file, from what the browser says or from its name; "" where neither tells. */
function typeOf(name, declared) {
  const type = declared.split(";")[0].toLowerCase();
  if (/^(image|video|audio)\/[\w.+-]+$/.test(type)) return type;
  return TYPES[name.split(".").pop().toLowerCase()] ?? "";
}

/** The kind of media item that a name stands for, or null. */
export function kindOf(name, declared = "") {
  const kind = typeOf(name, declared).split("/")[0];
  return KINDS.includes(kind) ? kind : null;
}

/** A file's attachment. Its bytes are read now, so that a file that changes or goes away later does not matter. */
async function fromFile(file, name = file.name) {
  return {kind: kindOf(name, file.type), name, type: typeOf(name, file.type), blob: file, base64: await base64(file)};
}

/**
 * Gives `add` the attachments of files, one by one. `whyNot(kind, name)` says why a file is not taken, or "".
 * Resolves to a line for every file that is not taken, or cannot be read (a folder, say).
 */
export async function readFiles(files, add, whyNot) {
  const refused = [];
  for (const file of files) {
    const name = file.name || `${t("pasted")}.${file.type.split("/")[1] ?? ""}`;
    const why = whyNot(kindOf(name, file.type), name);
    const found = why ? null : await fromFile(file, name).catch(() => null);
    if (found) add(found);
    else refused.push(why || t("attach.unreadable", {name}));
  }
  return refused;
}

export function fromUrl(url, kind) {
  return {kind, name: decodedName(url), type: "", url};
}

function decodedName(url) {
  const last = new URL(url).pathname.split("/").pop();
  try {
    return decodeURIComponent(last) || url;
  } catch {
    return last || url;
  }
}

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** A small view of an attachment. Media behind URLs are not loaded: the server fetches them, not this page. */
export function preview(attachment) {
  const node = el("figure", {class: `media-item ${attachment.kind}`, title: attachment.url ?? attachment.name});
  if (attachment.url) node.append(icon(attachment.kind), el("figcaption", {}, attachment.name));
  else node.append(element(attachment), el("figcaption", {}, attachment.name));
  return node;
}

function element(attachment) {
  const src = URL.createObjectURL(attachment.blob);
  const forget = () => URL.revokeObjectURL(src);
  if (attachment.kind === "image") {
    const node = el("img", {src, alt: attachment.name, on: {load: forget}});
    node.addEventListener("error", () => { forget(); node.replaceWith(icon("image")); });
    return node;
  }
  return el(attachment.kind, {src, controls: true, preload: "metadata", playsinline: true,
                              "aria-label": attachment.name});
}

/** The attachments of a message that is being written. */
export class Tray {
  constructor(list, {takes}) {
    this.list = list;
    this.takes = takes;
    this.attachments = [];
  }

  /** Attaches what can be used of it; says why of each other file. */
  addFiles(files) {
    return readFiles(files, (attachment) => this.add(attachment), (kind, name) => {
      if (kind === null) return t("attach.unknown", {name});
      return this.takes(kind) ? "" : t("attach.unsupported", {name, kind: t(`kind.${kind}`)});
    });
  }

  add(attachment) {
    this.attachments.push(attachment);
    this.show();
  }

  /** Everything in it; afterwards it is empty. */
  take() {
    const taken = this.attachments;
    this.set([]);
    return taken;
  }

  set(attachments) {
    this.attachments = [...attachments];
    this.show();
  }

  show() {
    this.list.hidden = this.attachments.length === 0;
    this.list.replaceChildren(...this.attachments.map((attachment) => {
      const remove = title(el("button", {type: "button", class: "remove icon-only", on: {click: () => {
        this.set(this.attachments.filter((other) => other !== attachment));
        document.getElementById("text").focus();
      }}}, icon("close")), "attach.remove");
      return el("li", {}, preview(attachment), remove);
    }));
  }
}
