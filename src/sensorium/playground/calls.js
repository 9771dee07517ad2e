// The tool calls of an answer as elements: name, arguments as they come, and a field for each one's result.

import {waitsForResults} from "./answer.js";
import {el} from "./dom.js";
import {say} from "./i18n.js";

export class CallsView {
  /** `goOn` is called when the results are to be sent. */
  constructor(goOn) {
    this.list = el("div", {class: "calls"});
    this.send = say(el("button", {type: "button", class: "primary small", on: {click: goOn}}), "call.send");
    this.node = el("div", {class: "calls", hidden: true}, this.list, this.send);
    this.shown = [];  // {call, given, result}
  }

  show(answer) {
    this.node.hidden = answer.calls.length === 0;
    this.send.hidden = !waitsForResults(answer);
    if (answer.calls[0] !== this.shown[0]?.call) {
      this.shown = [];
      this.list.replaceChildren();
    }
    answer.calls.slice(this.shown.length).forEach((call) => this.add(call));
    for (const {call, given, result} of this.shown) {
      given.textContent = call.arguments;
      result.hidden = this.send.hidden;
    }
  }

  add(call) {
    const given = el("code");
    const field = el("textarea", {rows: 1});
    field.value = call.result;
    field.addEventListener("input", () => { call.result = field.value; });
    const result = el("label", {hidden: true}, say(el("span"), "call.result"), field);
    this.list.append(el("div", {class: "call"}, el("p", {}, say(el("span", {class: "hint"}), "call"), " ",
                                                   el("code", {class: "name"}, call.name)),
                        el("pre", {class: "code", tabindex: "0"}, given), result));
    this.shown.push({call, given, result});
  }
}
