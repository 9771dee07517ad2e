// Things to try for who has nothing at hand: an image, a video and audio made on the spot, a little different each time.

import {videoFile, record} from "./capture.js";
import {encodeWav} from "./wav.js";

const COLORS = ["#d92c2c", "#2563d9", "#1f9d4d", "#e8b500", "#8b3fc7", "#ee7d1a"];
const SHAPES = ["circle", "square", "triangle"];
const SIZE = 224;

const pick = (list) => list[Math.floor(Math.random() * list.length)];

function draw(context, shape, color, x, y, radius) {
  context.fillStyle = color;
  context.beginPath();
  if (shape === "circle") context.arc(x, y, radius, 0, 2 * Math.PI);
  else if (shape === "square") context.rect(x - radius, y - radius, 2 * radius, 2 * radius);
  else [[0, -1], [1, 0.9], [-1, 0.9]].forEach(([dx, dy]) => context.lineTo(x + radius * dx, y + radius * dy));
  context.fill();
}

function canvas() {
  const node = document.createElement("canvas");
  node.width = node.height = SIZE;
  const context = node.getContext("2d");
  const clear = () => {
    context.fillStyle = "#ffffff";
    context.fillRect(0, 0, SIZE, SIZE);
  };
  clear();
  return {node, context, clear};
}

/** One or two shapes side by side. */
export function image() {
  const {node, context} = canvas();
  const count = 1 + Math.floor(2 * Math.random());
  const colors = [...COLORS].sort(() => Math.random() - 0.5);
  for (let at = 0; at < count; at++) {
    draw(context, pick(SHAPES), colors[at], SIZE * (at + 0.5) / count, SIZE * (0.4 + 0.2 * Math.random()), 38);
  }
  return new Promise((resolve) => {
    node.toBlob((blob) => resolve(new File([blob], "drawing.png", {type: "image/png"})), "image/png");
  });
}

/** A shape that moves to one side for two seconds. */
export async function video() {
  const {node, context, clear} = canvas();
  const [shape, color] = [pick(SHAPES), pick(COLORS)];
  const [dx, dy] = pick([[1, 0], [-1, 0], [0, 1], [0, -1]]);
  const durationMs = 2000;
  const startMs = performance.now();
  let running = true;
  const frame = () => {
    const way = (Math.min(1, (performance.now() - startMs) / durationMs) - 0.5) * 130;
    clear();
    draw(context, shape, color, SIZE / 2 + way * dx, SIZE / 2 + way * dy, 34);
    if (running) requestAnimationFrame(frame);
  };
  frame();
  try {
    return videoFile(await record(node.captureStream(15), durationMs), "moving");
  } finally {
    running = false;
  }
}

/** One to four beeps. */
export function audio() {
  const rate = 16_000;
  const count = 1 + Math.floor(4 * Math.random());
  const samples = new Float32Array((0.2 + 0.45 * count) * rate);
  for (let beep = 0; beep < count; beep++) {
    const start = Math.round((0.2 + 0.45 * beep) * rate);
    const length = 0.2 * rate;
    for (let at = 0; at < length; at++) {
      const fade = Math.min(1, at / 160, (length - at) / 160);
      samples[start + at] = 0.4 * fade * Math.sin(2 * Math.PI * 660 * at / rate);
    }
  }
  return new File([encodeWav(samples, rate)], "beeps.wav", {type: "audio/wav"});
}
