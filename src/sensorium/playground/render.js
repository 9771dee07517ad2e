// A model's text as paragraphs, lists, code and emphasis. Made of text nodes and a few fixed elements: whatever the
// text contains, it is never read as markup.

import {copy, el} from "./dom.js";
import {flash} from "./dialogs.js";
import {say} from "./i18n.js";

const FENCE = /^ {0,3}(```+|~~~+)/;
const BULLET = /^\s*(?:[-*+]|\d{1,3}[.)])\s+/;
const NUMBERED = /^\s*\d/;

/** Shows text in `node`, again and again while it grows: blocks that have not changed are left alone. */
export function renderInto(node, text) {
  const blocks = split(text);
  const shown = node.blocks ?? [];
  let same = 0;
  while (same < blocks.length && blocks[same] === shown[same]) same++;
  while (node.childNodes.length > same) node.lastChild.remove();
  node.append(...blocks.slice(same).map(block));
  node.blocks = blocks;
}

/** Text in blocks: fenced code, and what stands between empty lines. */
function split(text) {
  const blocks = [];
  let lines = [];
  let fence = "";
  const close = () => {
    if (lines.length) blocks.push(lines.join("\n"));
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = FENCE.exec(line)?.[1];
    if (fence) {
      lines.push(line);
      if (mark && mark[0] === fence[0] && mark.length >= fence.length && line.trim() === mark) {
        fence = "";
        close();
      }
    } else if (mark) {
      close();
      lines.push(line);
      fence = mark;
    } else if (line.trim() === "") {
      close();
    } else {
      lines.push(line);
    }
  }
  close();
  return blocks;
}

function block(source) {
  const lines = source.split("\n");
  if (FENCE.test(lines[0])) return codeBlock(lines);
  if (lines.every((line) => BULLET.test(line))) return list(lines);
  const heading = lines.length === 1 && /^(#{1,6})\s+(.+)$/.exec(source);
  if (heading) return el("p", {class: "heading"}, ...spans(heading[2]));
  return el("p", {}, ...spans(source));
}

function codeBlock([first, ...lines]) {
  const mark = FENCE.exec(first)[1];
  if (lines.length && lines.at(-1).trim().startsWith(mark)) lines.pop();
  const code = lines.join("\n");
  const button = say(el("button", {type: "button", class: "quiet small", on: {click: async () => {
    await copy(code);
    flash(button);
  }}}), "copy");
  const name = first.replace(FENCE, "").trim();
  return el("div", {class: "fenced"}, el("div", {class: "row"}, el("span", {class: "grow hint"}, name), button),
            el("pre", {class: "code", tabindex: "0"}, el("code", {}, code)));
}

const list = (lines) => el(NUMBERED.test(lines[0]) ? "ol" : "ul", {},
                           ...lines.map((line) => el("li", {}, ...spans(line.replace(BULLET, "")))));

/** `code` and **strong** in a line; everything else as it is. */
export function spans(text) {
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).filter(Boolean).map((piece) => {
    if (piece.length > 2 && piece.startsWith("`") && piece.endsWith("`")) return el("code", {}, piece.slice(1, -1));
    if (piece.length > 4 && piece.startsWith("**") && piece.endsWith("**")) return el("strong", {}, piece.slice(2, -2));
    return document.createTextNode(piece);
  });
}
