// A request as a person would write it: curl for a shell, Python and JavaScript for OpenAI's clients. Files stand
// there by name, not by their bytes; the key never stands there.

const CHAT = "v1/chat/completions";
const OPENAI_FIELDS = new Set(["model", "messages", "temperature", "top_p", "max_tokens", "seed", "stop", "stream",
                               "presence_penalty", "frequency_penalty", "stream_options", "input", "tools",
                               "tool_choice", "response_format", "reasoning_effort"]);

/** {curl, python, javascript}. `makeBody(place)` builds the body and lets `place` say how a media item is written. */
export function snippets(path, makeBody, {withKey}) {
  const marks = new Map();  // what stands for a file in the body -> the attachment and its form
  const nonce = [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16)).join("");
  const place = (attachment, form) => {
    if (attachment.url) return attachment.url;
    const mark = `${nonce}-${marks.size}-`;
    marks.set(mark, {attachment, form});
    return mark;
  };
  const body = makeBody(place);
  return {curl: asCurl(path, body, marks, withKey), python: asPython(path, body, marks),
          javascript: asJavaScript(path, body, marks)};
}

const address = (path) => new URL(path, document.baseURI).href;
const head = ({attachment, form}) => (form === "url" ? `data:${attachment.type};base64,` : "");

// curl

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function asCurl(path, body, marks, withKey) {
  // The body is a here-document that the shell fills with the files, so its own signs are escaped.
  let text = JSON.stringify(body, null, 2).replace(/[\\$`]/g, "\\$&");
  for (const [mark, item] of marks) {
    text = text.replaceAll(mark, () => `${head(item)}$(base64 < ${quoted(item.attachment.name)} | tr -d '\\n')`);
  }
  return [`curl -N ${quoted(address(path))} \\`, "  -H 'Content-Type: application/json' \\",
          ...(withKey ? ['  -H "Authorization: Bearer $SENSORIUM_API_KEY" \\'] : []),
          "  -d @- <<JSON", text, "JSON"].join("\n");
}

// Python

function literal(value, marks, indent) {
  const inner = indent + "    ";
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "number") return String(value);
  if (typeof value === "string") return marks.has(value) ? fileExpression(marks.get(value)) : JSON.stringify(value);
  const isList = Array.isArray(value);
  const rows = isList ? value.map((item) => literal(item, marks, inner))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, marks, inner)}`);
  const [open, close] = isList ? "[]" : "{}";
  const flat = `${open}${rows.join(", ")}${close}`;
  if (flat.length + indent.length < 90 && !flat.includes("\n")) return flat;
  return `${open}\n${rows.map((row) => `${inner}${row},\n`).join("")}${indent}${close}`;
}

function fileExpression(item) {
  const bytes = `encoded(${JSON.stringify(item.attachment.name)})`;
  return head(item) ? `${JSON.stringify(head(item))} + ${bytes}` : bytes;
}

function asPython(path, body, marks) {
  const lines = [];
  if (marks.size) lines.push("import base64");
  lines.push("import os");
  if (marks.size) lines.push("from pathlib import Path");
  lines.push("", "from openai import OpenAI", "");
  if (marks.size) {
    lines.push("", "def encoded(name):", "    return base64.b64encode(Path(name).read_bytes()).decode()", "", "");
  }
  lines.push('api_key = os.environ.get("SENSORIUM_API_KEY", "none")',
             `client = OpenAI(base_url=${JSON.stringify(address("v1"))}, api_key=api_key)`);
  return [...lines, ...pythonCall(path, body, marks)].join("\n");
}

const PYTHON_CALLS = [
  "        for call in delta.tool_calls or []:",
  '            name = f"\\n{call.function.name} " if call.function.name else ""',
  '            print(name + (call.function.arguments or ""), end="", flush=True)',
];

function pythonCall(path, body, marks) {
  const named = Object.entries(body).filter(([name]) => OPENAI_FIELDS.has(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI_FIELDS.has(name)));
  const rows = named.map(([name, value]) => `    ${name}=${literal(value, marks, "    ")},`);
  if (Object.keys(extra).length) rows.push(`    extra_body=${literal(extra, marks, "    ")},`);
  if (path === CHAT) {
    return ["stream = client.chat.completions.create(", ...rows, ")", "for chunk in stream:",
            "    for choice in chunk.choices:", "        delta = choice.delta",
            '        print(getattr(delta, "reasoning", None) or delta.content or "", end="", flush=True)',
            ...(body.tools ? PYTHON_CALLS : [])];
  }
  if (path === "v1/embeddings" && body.input) {
    return ["answer = client.embeddings.create(", ...rows, ")", "print([row.embedding for row in answer.data])"];
  }
  const place = JSON.stringify(path.replace(/^v1/, ""));
  return [`answer = client.post(${place}, cast_to=object, body=${literal(body, marks, "")})`, "print(answer)"];
}

// JavaScript, for Node

function asJavaScript(path, body, marks) {
  const lines = ['import OpenAI from "openai";'];
  if (marks.size) {
    lines.push('import {readFileSync} from "node:fs";', "",
               'const encoded = (name) => readFileSync(name).toString("base64");');
  }
  lines.push("", 'const apiKey = process.env.SENSORIUM_API_KEY ?? "none";',
             `const client = new OpenAI({baseURL: ${JSON.stringify(address("v1"))}, apiKey});`);
  let text = JSON.stringify(body, null, 2);
  for (const [mark, item] of marks) text = text.replaceAll(JSON.stringify(mark), () => fileExpression(item));
  return [...lines, ...javaScriptCall(path, body, text)].join("\n");
}

const JAVASCRIPT_CALLS = [
  "    for (const {function: call} of delta.tool_calls ?? []) {",
  '      process.stdout.write((call.name ? `\\n${call.name} ` : "") + (call.arguments ?? ""));',
  "    }",
];

function javaScriptCall(path, body, text) {
  if (path === CHAT) {
    return [`const stream = await client.chat.completions.create(${text});`, "for await (const chunk of stream) {",
            "  for (const {delta} of chunk.choices) {",
            '    process.stdout.write(delta.reasoning || delta.content || "");',
            ...(body.tools ? JAVASCRIPT_CALLS : []), "  }", "}"];
  }
  if (path === "v1/embeddings" && body.input) {
    return [`const answer = await client.embeddings.create(${text});`,
            "console.log(answer.data.map((row) => row.embedding));"];
  }
  const place = JSON.stringify(path.replace(/^v1/, ""));
  return [`const answer = await client.post(${place}, {body: ${text}});`, "console.log(answer);"];
}
