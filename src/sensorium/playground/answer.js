// An answer on its way: what the chunks of a stream add up to. Pure: no elements, no network.

/** Chunks that come closer together say how the network joined them, not how fast the model writes. */
const MEASURABLE_MS = 20;

export const newAnswer = () => ({
  text: "", reasoning: "", calls: [],  // {id, name, arguments, result}
  state: "running", error: null, usage: null, finish: null, timing: {firstMs: null, firstTokens: 0, perSecond: null},
});

/** Adds a chunk that came `nowMs` after the request. */
export function addChunk(answer, chunk, nowMs) {
  const [choice] = chunk.choices;
  addDelta(answer, choice?.delta ?? {});
  answer.finish = choice?.finish_reason ?? answer.finish;
  answer.usage = chunk.usage ?? answer.usage;
  measure(answer.timing, Boolean(choice), answer.usage?.completion_tokens ?? 0, nowMs);
}

function addDelta(answer, delta) {
  answer.text += delta.content ?? "";
  answer.reasoning += delta.reasoning ?? "";
  for (const {index, id, function: called} of delta.tool_calls ?? []) {
    const call = answer.calls[index] ??= {id: "", name: "", arguments: "", result: ""};
    call.id ||= id ?? "";
    call.name += called?.name ?? "";
    call.arguments += called?.arguments ?? "";
  }
}

function measure(timing, hasChoice, tokens, nowMs) {
  timing.firstMs ??= nowMs;
  if (!timing.firstTokens) {
    timing.firstTokens = tokens;  // the first event is the role's, before any token
  } else if (hasChoice && tokens > timing.firstTokens && nowMs - timing.firstMs >= MEASURABLE_MS) {
    timing.perSecond = 1000 * (tokens - timing.firstTokens) / (nowMs - timing.firstMs);
  }
}

/** Does it wait for the results of its calls? Calls that were cut off have none. */
export const waitsForResults = ({calls, state, finish}) => calls.length > 0 && state === "done" && finish !== "length";
