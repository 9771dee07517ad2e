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

/** The body of a chat request. `recipe` is {model, system, sampling, messages: [{role, text, attachments}]}. */
export function chatBody(recipe, place = inline) {
  const messages = recipe.messages.map(({role, text, attachments = []}) => ({
    role, content: attachments.length ? contentParts(text, attachments, place) : text}));
  if (recipe.system) messages.unshift({role: "system", content: recipe.system});
  return {model: recipe.model, messages, ...recipe.sampling, stream: true, stream_options: {include_usage: true}};
}

/** The messages that go before a turn: what was answered, in full or in part, and not what failed. */
export function history(turns) {
  return turns.filter((turn) => turn.answer.text).flatMap((turn) => [
    {role: "user", text: turn.text, attachments: turn.attachments}, {role: "assistant", text: turn.answer.text}]);
}

/** Where `messages[2].content[0].image_url.url` points: [message, part]; null where it names no message. */
export function messagePlace(param) {
  const found = /^messages\[(\d+)\](?:\.content\[(\d+)\])?/.exec(param ?? "");
  return found && [Number(found[1]), found[2] === undefined ? null : Number(found[2])];
}
