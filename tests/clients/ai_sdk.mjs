// Vercel's AI SDK through both of its providers, as its documentation uses them. Prints one line per check.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false; // it prints them where the checks are printed
const baseURL = process.env.OPENAI_BASE_URL;
const TEXT = "Grüße, world! 🙂 ok";
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "sensorium", baseURL, supportsStructuredOutputs: true });
const models = {
  responses: openai.responses("gpt-4o-mini"),
  chat: openai.chat("gpt-4o-mini"),
  compatible: compatible("gpt-4o-mini"),
};
const get_weather = tool({
  description: "The weather now.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `sunny in ${city}`,
});

for (const [name, model] of Object.entries(models)) {
  assert.equal((await generateText({ model, prompt: "hi" })).text, TEXT);
  let text = "";
  for await (const piece of streamText({ model, prompt: "hi" }).textStream) text += piece;
  assert.equal(text, TEXT);
  const { object } = await generateObject({ model, prompt: "Who?", schema: z.object({ name: z.string(), age: z.number() }) });
  assert.deepEqual(object, { name: "Ann", age: 30 });
  const tools = { get_weather };
  const called = await generateText({ model, prompt: "weather?", tools, stopWhen: stepCountIs(2), providerOptions: { openai: { store: false } } });
  assert.match(called.text, /sunny in Paris/);
  const streamed = streamText({ model, prompt: "weather?", tools, stopWhen: stepCountIs(2), providerOptions: { openai: { store: false } } });
  let answer = "";
  for await (const piece of streamed.textStream) answer += piece;
  assert.match(answer, /sunny in Paris/);
  console.log(name, "ok");
}
