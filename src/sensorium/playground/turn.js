// One question and its answer as elements. Knows how they look, not where they come from.

import {preview} from "./attachments.js";
import {CallsView} from "./calls.js";
import {el, icon} from "./dom.js";
import {number, say, title} from "./i18n.js";
import {ReasoningView} from "./reasoning.js";
import {renderInto, spans} from "./render.js";

const button = (name, iconName, click) => title(
  el("button", {type: "button", class: "quiet icon-only small", on: {click}}, icon(iconName)), name);

export class TurnView {
  /** `actions` are {edit, again, request, goOn}, called with the turn. */
  constructor(turn, actions) {
    this.turn = turn;
    this.media = turn.attachments.map(preview);
    this.reasoning = new ReasoningView();
    this.body = el("div", {class: "text"});
    this.calls = new CallsView(() => actions.goOn(turn));
    this.error = el("div", {class: "error", role: "alert", hidden: true});
    this.stats = el("ul", {class: "stats", hidden: true});
    this.tools = el("div", {class: "row tools", hidden: true}, button("turn.again", "again", () => actions.again(turn)),
                    button("turn.request", "code", () => actions.request(turn)));
    this.question = el("div", {class: "question", hidden: Boolean(turn.results)}, say(el("h3", {class: "visually-hidden"}), "turn.you"),
                       ...(this.media.length ? [el("div", {class: "media"}, ...this.media)] : []),
                       ...(turn.text ? [el("p", {class: "text"}, turn.text)] : []),
                       el("div", {class: "row tools"}, button("turn.edit", "edit", () => actions.edit(turn))));
    this.answer = el("div", {class: "answer", "aria-busy": "true"}, say(el("h3", {class: "visually-hidden"}), "turn.model"),
                     this.reasoning.node, this.body, this.calls.node, this.error, this.stats, this.tools);
    this.node = el("article", {class: "turn"}, this.question, this.answer);
    this.frame = 0;
  }

  /** Show the answer as it is then, at most once per frame. `around` is called with the work. */
  refresh(around) {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      around(() => this.show());
    });
  }

  show() {
    const {answer} = this.turn;
    const running = answer.state === "running";
    this.answer.classList.toggle("running", running);
    this.answer.setAttribute("aria-busy", String(running));
    this.tools.hidden = running;
    this.reasoning.show(answer);
    renderInto(this.body, this.turn.recipe.fields.response_format && answer.text ? asCode(answer.text) : answer.text);
    this.calls.show(answer);
    this.showError();
    this.stats.hidden = running || !answer.usage;
    if (!this.stats.hidden) this.stats.replaceChildren(...facts(answer));
  }

  showError() {
    const {error} = this.turn.answer;
    this.error.hidden = !error;
    for (const node of [this.question, ...this.media]) node.classList.remove("refused");
    if (!error) return;
    this.error.replaceChildren(el("p", {}, ...spans(error.message)));
    if (error.param) this.error.append(el("p", {class: "hint"}, say(el("span"), "error.field"), " ", el("code", {}, error.param)));
    if (error.place?.own) (this.media[error.place.part] ?? this.question).classList.add("refused");
  }
}

/** JSON is shown as code. No line of it can end this fence. */
const asCode = (json) => `\`\`\`\`\`\`json\n${json}`;

/** Tokens, times and why it ended, as list items. */
function facts(answer) {
  const {usage, timing} = answer;
  const details = usage.prompt_tokens_details ?? {};
  const media = Object.entries(details.multimodal_tokens ?? {});
  const rows = [
    ["stat.tokens", {prompt: number(usage.prompt_tokens), answer: number(usage.completion_tokens)}],
    ["stat.cached", {tokens: number(details.cached_tokens ?? 0)}],
    ...media.map(([kind, tokens]) => [`stat.${kind}`, {tokens: number(tokens)}]),
    timing.firstMs === null ? null : ["stat.first", {seconds: number(timing.firstMs / 1000, 2)}],
    timing.perSecond === null ? null : ["stat.speed", {speed: number(timing.perSecond, 1)}],
    ["stop", "tool_calls", null, undefined].includes(answer.finish) ? null : [`stat.${answer.finish}`, {}],
  ];
  return rows.filter(Boolean).map(([name, values]) => say(el("li", {data: {stat: name.slice(5)}}), name, values));
}
