// A small plot of the last minutes, as SVG. Gaps stay gaps.

import {el, svg} from "./dom.js";
import {say, t} from "./i18n.js";

const POINTS = 90;
const [WIDTH, HEIGHT] = [300, 80];

/** `series` are names of texts; `format` turns a value into words. */
export function createPlot(titleName, series, format) {
  const history = series.map(() => []);
  const now = el("output", {class: "now"});
  const top = el("span", {class: "top hint"});
  const drawing = svg("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img"});
  const legend = el("p", {class: "legend hint"}, ...(series.length > 1 ? series.map((name, place) =>
    el("span", {class: `series-${place}`}, say(el("span"), name))) : []));
  const node = el("figure", {class: "plot"},
                  el("figcaption", {}, say(el("span", {class: "grow"}), titleName), now), top, drawing, legend);
  const show = () => {
    const most = niceTop(Math.max(0, ...history.flat().filter(Number.isFinite)));
    drawing.replaceChildren(...history.flatMap((values, place) => lines(values, most, place)));
    const last = history[0].findLast(Number.isFinite);
    now.textContent = last === undefined ? "–" : format(last);
    top.textContent = format(most);
    drawing.setAttribute("aria-label", `${t(titleName)}: ${now.textContent}`);
  };
  show();
  return {node, show, push(values) {
    history.forEach((kept, place) => {
      kept.push(values[place]);
      if (kept.length > POINTS) kept.shift();
    });
    show();
  }};
}

/** 1, 2 or 5 times a power of ten, at least as large as the value. */
function niceTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

/** One line per run of values without a gap; the newest value stands at the right edge. */
function lines(values, most, place) {
  const runs = [];
  let run = [];
  values.forEach((value, at) => {
    if (Number.isFinite(value)) {
      const x = WIDTH * (POINTS - values.length + at) / (POINTS - 1);
      run.push([x.toFixed(1), (HEIGHT - 2 - (HEIGHT - 6) * Math.max(0, value) / most).toFixed(1)]);
    }
    if (!Number.isFinite(value) || at === values.length - 1) {
      if (run.length) runs.push(run);
      run = [];
    }
  });
  return runs.flatMap((points) => {
    if (points.length === 1) points.push([Number(points[0][0]) + 1, points[0][1]]);
    const way = points.map((point) => point.join(",")).join(" ");
    const line = svg("polyline", {points: way, class: `line series-${place}`});
    if (place) return [line];
    const area = `${points[0][0]},${HEIGHT} ${way} ${points.at(-1)[0]},${HEIGHT}`;
    return [svg("polygon", {points: area, class: `area series-${place}`}), line];
  });
}
