// What a model thinks before it answers: a block that is open until the answer begins.

import {el} from "./dom.js";
import {say} from "./i18n.js";
import {renderInto} from "./render.js";

export class ReasoningView {
  constructor() {
    this.body = el("div", {class: "text"});
    this.node = el("details", {class: "reasoning", hidden: true}, say(el("summary"), "reasoning"), this.body);
    this.thinking = false;
  }

  show({text, reasoning, calls}) {
    this.node.hidden = !reasoning;
    const thinking = Boolean(reasoning) && !text.trim() && calls.length === 0;
    // Only when that changes: in between, whoever opens or closes it decides.
    if (thinking !== this.thinking) this.node.open = thinking;
    this.thinking = thinking;
    renderInto(this.body, reasoning);
  }
}
