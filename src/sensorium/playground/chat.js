// The chat tab: the composer, the conversation, and the stream that joins them.

import {addChunk, newAnswer} from "./answer.js";
import * as api from "./api.js";
import {Tray, fromUrl, KINDS} from "./attachments.js";
import {canCapture, fromCamera, startMicrophone} from "./capture.js";
import {chatBody, conversation, messagePlace} from "./conversation.js";
import {askForUrl, showRequest} from "./dialogs.js";
import {announce, byId, el, icon, lines, notice} from "./dom.js";
import {onLanguage, say, t, title} from "./i18n.js";
import {Settings} from "./settings.js";
import {snippets} from "./snippets.js";
import * as samples from "./samples.js";
import * as store from "./store.js";
import {TurnView} from "./turn.js";

const PATH = "v1/chat/completions";
const SAMPLES = [
  {kind: null, name: "sample.text", icon: "text"},
  {kind: "image", name: "sample.image", icon: "image", make: samples.image},
  {kind: "video", name: "sample.video", icon: "video", make: samples.video},
  {kind: "audio", name: "sample.audio", icon: "audio", make: samples.audio},
];

let turns = [];  // {text, attachments, results, recipe, answer, view}; `results` instead of a text: of the calls before
let running = null;  // the AbortController of the answer that is being written
let microphone = null;

const text = byId("text");
const list = byId("turns");
const settings = new Settings(byId("settings"));
const tray = new Tray(byId("tray"), {takes: store.takes});

export function start() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  text.addEventListener("keydown", onKey);
  text.addEventListener("input", grow);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("clear").addEventListener("click", clear);
  startAttaching();
  startSettingsToggle();
  showSamples();
  store.watch(showAbilities);
  onLanguage(showAbilities);
}

// Writing

function onKey(event) {
  if (event.key === "Escape" && running) running.abort();
  // An input method uses Enter to choose a word.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) send();
  }
}

function grow() {
  text.style.height = "auto";
  text.style.height = `${Math.min(text.scrollHeight, 240)}px`;
}

function send() {
  const words = text.value.trim();
  if (running || byId("send").disabled || (!words && !tray.attachments.length)) return;
  const turn = {text: words, attachments: tray.take()};
  text.value = "";
  grow();
  answer(turn);
}

function clear() {
  running?.abort();
  cut(0);
  notice(byId("notice"));
  showState();
  text.focus();
}

/** Forgets the turns from there on. */
function cut(at) {
  for (const turn of turns.splice(at)) turn.view.node.remove();
}

/** Back into the composer, with everything that came after it gone. */
function edit(turn) {
  running?.abort();
  cut(turns.indexOf(turn));
  text.value = turn.text;
  tray.set(turn.attachments);
  showState();
  grow();
  text.focus();
}

// Answering

/** Ask for an answer to `turn`, which is new or is asked once more. What came after `before` and it is gone. */
async function answer(turn, before = turns) {
  notice(byId("notice"));
  settings.clearErrors();
  let fields;
  try {
    fields = settings.fields();
  } catch (error) {
    refuse(turn, error);
    return;
  }
  cut(before.length + (turns.includes(turn) ? 1 : 0));
  turn.recipe = {model: store.get().model, system: settings.system, fields, messages: conversation([...before, turn])};
  turn.answer = newAnswer();
  show(turn);
  await run(turn);
}

/** A setting that cannot be sent: nothing was asked, so the words go back where they came from. */
function refuse(turn, error) {
  if (!turns.includes(turn) && !turn.results) {
    text.value = turn.text;
    tray.set(turn.attachments);
    grow();
  }
  openSettings(true);
  settings.showError(error);
}

function show(turn) {
  if (!turns.includes(turn)) {
    turns.push(turn);
    turn.view = new TurnView(turn, {edit, again, request, goOn});
    list.append(turn.view.node);
  }
  turn.view.show();
  list.scrollTop = list.scrollHeight;
}

async function run(turn) {
  const own = running = new AbortController();
  const state = turn.answer;
  showState();
  announce(t("answering"));
  try {
    await receive(turn, own.signal);
    state.state = "done";
  } catch (error) {
    state.state = error.name === "AbortError" ? "stopped" : "failed";
    if (state.state === "stopped") state.finish = "stopped";
    else fail(turn, error);
  }
  if (running === own) running = null;
  following(() => turn.view.show());
  showState();
  announce(ending(state));
}

function ending({error, calls, usage}) {
  if (error) return error.message;
  if (calls.length) return t("called", {names: calls.map(({name}) => name).join(", ")});
  return t("answered", {tokens: usage?.completion_tokens ?? 0});
}

/** Read the stream into the turn's answer. The usage comes with every chunk, so that a stopped answer has one too. */
async function receive(turn, signal) {
  const body = chatBody(turn.recipe);
  body.stream_options.continuous_usage_stats = true;
  const startMs = performance.now();
  for await (const chunk of api.stream(PATH, body, signal)) {
    addChunk(turn.answer, chunk, performance.now() - startMs);
    turn.view.refresh(following);
  }
}

/** Keep what failed where it failed: in the turn, and at the field or the attachment that the error names. */
function fail(turn, error) {
  if (!(error instanceof api.ApiError)) console.error(error);
  const place = messagePlace(error.param);
  const own = turn.recipe.messages.length - 1 + (turn.recipe.system ? 1 : 0);
  turn.answer.error = {message: error.message, param: error.param,
                       place: place && {own: place[0] === own, part: place[1]}};
  if (!place && error.param && error.param !== "model") {
    openSettings(true);
    settings.showError(error);
  }
}

function again(turn) {
  if (running) return;
  answer(turn, turns.slice(0, turns.indexOf(turn)));
}

/** Gives the model the results of the calls that it has made. */
function goOn(turn) {
  if (running) return;
  const results = turn.answer.calls.map(({id, result}) => ({callId: id, text: result}));
  answer({text: "", attachments: [], results}, turns.slice(0, turns.indexOf(turn) + 1));
}

function request(turn) {
  showRequest(snippets(PATH, (place) => chatBody(turn.recipe, place), {withKey: Boolean(api.key.get())}));
}

/** Stay at the end while something is added there, unless somebody has scrolled up to read. */
function following(work) {
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 120;
  work();
  if (atEnd) list.scrollTop = list.scrollHeight;
}

// What can be done now

function showState() {
  byId("welcome").hidden = turns.length > 0;
  byId("clear").hidden = turns.length === 0;
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = Boolean(running);
  byId("stop").hidden = !running;
  if (hadFocus) byId(running ? "stop" : "send").focus();
}

function showAbilities() {
  const known = Boolean(store.model());
  const canChat = known && store.does("generate");
  const media = KINDS.some(store.takes);
  byId("send").disabled = !canChat;
  if (known && !canChat) notice(byId("notice"), t("chat.cannot"));
  else if (byId("notice").textContent === t("chat.cannot")) notice(byId("notice"));
  byId("file").accept = KINDS.filter(store.takes).map((kind) => `${kind}/*`).join(",");
  able("attach-file", media, "attach.none");
  able("attach-url", media, "attach.none");
  able("attach-camera", canCapture() && (store.takes("image") || store.takes("video")),
       canCapture() ? "attach.none" : "attach.insecure");
  able("attach-microphone", canCapture() && store.takes("audio"), canCapture() ? "attach.no.audio" : "attach.insecure");
  for (const button of byId("samples").children) {
    button.hidden = !canChat || Boolean(button.dataset.kind && !store.takes(button.dataset.kind));
  }
}

/** A button that cannot be used says why. */
function able(id, can, why) {
  const button = byId(id);
  const name = button.dataset.name ??= button.dataset.i18nTitle;
  button.disabled = !can;
  title(button, can ? name : why);
}

function showSamples() {
  byId("samples").replaceChildren(...SAMPLES.map(({kind, name, icon: iconName, make}) => {
    const button = el("button", {type: "button", data: kind ? {kind} : {}}, icon(iconName), say(el("span"), name));
    button.addEventListener("click", async () => {
      if (running) return;
      button.disabled = true;
      try {
        if (make) await attach([await make()]);
        text.value = t(`${name}.question`);
        send();
      } finally {
        button.disabled = false;
        if (!matchMedia("(pointer: coarse)").matches) text.focus();
      }
    });
    return button;
  }));
}

// Attaching

function startAttaching() {
  byId("attach-file").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => {
    attach([...byId("file").files]);
    byId("file").value = "";
  });
  byId("attach-url").addEventListener("click", async () => {
    const given = await askForUrl(store.takes);
    if (given) tray.add(fromUrl(given.url, given.kind));
    text.focus();
  });
  byId("attach-camera").addEventListener("click", () => capturing(async () => {
    const file = await fromCamera({images: store.takes("image"), videos: store.takes("video")});
    if (file) await attach([file]);
  }));
  byId("attach-microphone").addEventListener("click", () => capturing(toggleMicrophone));
  document.addEventListener("paste", (event) => {
    if (byId("chat").hidden || !event.clipboardData.files.length) return;
    event.preventDefault();
    attach([...event.clipboardData.files]);
  });
  startDropping(byId("chat"));
}

async function attach(files) {
  notice(byId("notice"));
  const refused = await tray.addFiles(files);
  if (refused.length) notice(byId("notice"), ...lines(refused));
}

async function capturing(work) {
  try {
    await work();
  } catch (error) {
    notice(byId("notice"), t("attach.denied", {reason: error.message}));
  }
}

async function toggleMicrophone() {
  const button = byId("attach-microphone");
  if (microphone === null) {
    microphone = await startMicrophone();
    button.dataset.name = "attach.microphone.stop";
    announce(t("recording"));
  } else {
    const recording = microphone;
    microphone = null;
    button.dataset.name = "attach.microphone";
    await attach([await recording.stop()]);
  }
  button.classList.toggle("recording", microphone !== null);
  title(button, button.dataset.name);
}

function startDropping(panel) {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  panel.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    panel.classList.add("dropping");
  });
  panel.addEventListener("dragleave", (event) => {
    if (!panel.contains(event.relatedTarget)) panel.classList.remove("dropping");
  });
  panel.addEventListener("drop", (event) => {
    panel.classList.remove("dropping");
    if (!hasFiles(event)) return;
    event.preventDefault();
    attach([...event.dataTransfer.files]);
  });
}

// Settings

function openSettings(open) {
  byId("settings").hidden = !open;
  byId("toggle-settings").setAttribute("aria-expanded", String(open));
}

function startSettingsToggle() {
  const wide = matchMedia("(min-width: 54rem)");
  openSettings(wide.matches);
  wide.addEventListener("change", () => openSettings(wide.matches));
  byId("toggle-settings").addEventListener("click", () => {
    openSettings(byId("settings").hidden);
    if (!byId("settings").hidden) byId("system").focus();
  });
}
