// The only module that talks to the server. Paths are relative, so that the page works below a proxy's path too.

import {t} from "./i18n.js";
import {events} from "./sse.js";

const KEY = "sensorium-key";

/** What the server refused: `param` names the field, `status` is 0 where no answer came. */
export class ApiError extends Error {
  constructor(status, {message, param = null, code = null} = {}) {
    super(message || t("error.status", {status}));
    this.status = status;
    this.param = param;
    this.code = code;
  }
}

let askForKey = async () => null;
let asking = null;

/** `ask` is called with the reason when a key is needed; it resolves to a key, or to null to give up. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** The response, or an ApiError. On 401 a person is asked for the key, unless `quiet`. */
export async function request(path, {body, signal, quiet = false} = {}) {
  for (;;) {
    const response = await send(path, body, signal);
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || quiet || !(await newKey(error.code === "missing_api_key" ? "" : error.message))) {
      throw error;
    }
  }
}

async function send(path, body, signal) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  try {
    return await fetch(path, {method: body === undefined ? "GET" : "POST", headers, signal,
                              body: body === undefined ? undefined : JSON.stringify(body)});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, {message: t("error.network")});
  }
}

/** Several requests may find out at once that a key is needed: one question is enough. */
async function newKey(reason) {
  asking ??= askForKey(reason).finally(() => { asking = null; });
  const given = await asking;
  if (given) key.set(given);
  return Boolean(given);
}

async function errorOf(response) {
  try {
    return new ApiError(response.status, (await response.json()).error);
  } catch {
    return new ApiError(response.status);
  }
}

export const models = async (options) => (await (await request("v1/models", options)).json()).data;
export const version = async (options) => (await (await request("version", options)).json()).version;
export const metrics = async (options) => (await request("metrics", options)).text();
export const post = async (path, body, signal) => (await request(path, {body, signal})).json();

/** The chunks of a streaming answer; an error event in the middle is thrown. */
export async function* stream(path, body, signal) {
  const response = await request(path, {body, signal});
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(200, chunk.error);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError(0, {message: t("error.cut")});
    throw error;
  }
  throw new ApiError(0, {message: t("error.cut")});
}
