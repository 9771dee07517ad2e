// From what a person said and attached to the body of a request. Pure: no elements, no network.

/** How a media item stands in a body that is sent: its URL, or its bytes. */
export function inline(attachment, form) {
  if (attachment.url) return attachment.url;
  return form === "base64" ? attachment.base64 : `data:${attachment.type};base64,${attachment.base64}`;
}

/** Content parts, media first. `place(attachment, form)` says how a media item is written down. */
export function contentParts(text, attachments, place = inline) {
  const parts = attachments.map((attachment) => mediaPart(attachment, place));
  if (text) parts.push({type: "text", text});
  return parts;
}

function mediaPart(attachment, place) {
  if (attachment.kind === "audio" && !attachment.url) {
    return {type: "input_audio", input_audio: {data: place(attachment, "base64"), format: audioFormat(attachment)}};
  }
  const type = `${attachment.kind}_url`;
  return {type, [type]: {url: place(attachment, "url")}};
}

const FORMATS = {"audio/wav": "wav", "audio/x-wav": "wav", "audio/vnd.wave": "wav", "audio/mpeg": "mp3",
                 "audio/ogg": "ogg", "audio/flac": "flac", "audio/mp4": "m4a", "audio/x-m4a": "m4a",
                 "audio/webm": "webm", "audio/aac": "aac"};

const audioFormat = (attachment) => FORMATS[attachment.type.split(";")[0]] ?? "wav";

/** The body of a chat request. `recipe` is {model, system, fields, messages}. */
export function chatBody(recipe, place = inline) {
  const messages = recipe.messages.map((message) => written(message, place));
  if (recipe.system) messages.unshift({role: "system", content: recipe.system});
  return {model: recipe.model, messages, ...recipe.fields, stream: true, stream_options: {include_usage: true}};
}

/** A message as the API has it. Of {role, text, attachments, reasoning, calls, callId} all but two are optional. */
function written({role, text, attachments = [], reasoning, calls = [], callId}, place) {
  const content = attachments.length ? contentParts(text, attachments, place) : text;
  const message = {role, content: calls.length && !text ? null : content};
  if (callId !== undefined) message.tool_call_id = callId;
  if (reasoning) message.reasoning = reasoning;
  if (calls.length) {
    message.tool_calls = calls.map((call) => (
      {id: call.id, type: "function", function: {name: call.name, arguments: call.arguments}}));
  }
  return message;
}

/**
 * The messages of turns, of which the last is being asked. Before it stands what was answered, in full or in part, and
 * neither what failed nor calls that got no results.
 */
export function conversation(turns) {
  const kept = [];
  for (const turn of [...turns].reverse()) {
    if (!kept.length || turn.answer.text || kept[0].results) kept.unshift(turn);
  }
  return kept.flatMap((turn, at) => (at ? [said(kept[at - 1].answer, turn.results), ...asked(turn)] : asked(turn)));
}

function asked({text, attachments, results}) {
  if (!results) return [{role: "user", text, attachments}];
  return results.map((result) => ({role: "tool", ...result}));
}

const said = ({text, reasoning, calls}, results) => ({role: "assistant", text, reasoning, calls: results ? calls : []});

/** Where `messages[2].content[0].image_url.url` points: [message, part]; null where it names no message. */
export function messagePlace(param) {
  const found = /^messages\[(\d+)\](?:\.content\[(\d+)\])?/.exec(param ?? "");
  return found && [Number(found[1]), found[2] === undefined ? null : Number(found[2])];
}
