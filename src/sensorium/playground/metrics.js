// Prometheus' text format, and what two readings of it say about the time between them.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** name -> [{labels, value}] */
export function parse(text) {
  const families = new Map();
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : LINE.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\(.)/g, (_, sign) => (sign === "n" ? "\n" : sign));
    }
    if (!families.has(found[1])) families.set(found[1], []);
    families.get(found[1]).push({labels, value: Number(found[3])});
  }
  return families;
}

/** One model's numbers at one time. */
export class Reading {
  constructor(families, model, timeMs) {
    this.families = families;
    this.model = model;
    this.timeMs = timeMs;
  }

  rows(name) {
    return (this.families.get(name) ?? []).filter(({labels}) => labels.model_name === this.model);
  }

  /** The value of that name, NaN if there is none. */
  value(name) {
    return this.rows(name)[0]?.value ?? NaN;
  }

  /** What a counter gained per second since an earlier reading. */
  rate(name, earlier) {
    return (this.value(name) - earlier.value(name)) / ((this.timeMs - earlier.timeMs) / 1000);
  }

  /** The mean of what a histogram took in since then; NaN if nothing came. */
  mean(name, earlier) {
    const count = this.value(`${name}_count`) - earlier.value(`${name}_count`);
    return count > 0 ? (this.value(`${name}_sum`) - earlier.value(`${name}_sum`)) / count : NaN;
  }

  /** A part of counted questions that were answered from a cache, of all times; NaN before the first. */
  share(hits, queries) {
    return this.value(queries) > 0 ? this.value(hits) / this.value(queries) : NaN;
  }

  /** An upper bound of the quantile of what came since then, from the buckets. */
  quantile(name, part, earlier) {
    const before = new Map(earlier.rows(`${name}_bucket`).map(({labels, value}) => [labels.le, value]));
    const grown = this.rows(`${name}_bucket`).map(({labels, value}) => [Number(labels.le.replace("+Inf", "Infinity")),
                                                                       value - (before.get(labels.le) ?? 0)]);
    const total = grown.at(-1)?.[1] ?? 0;
    const bound = total > 0 ? grown.find(([, count]) => count >= part * total)[0] : NaN;
    return Number.isFinite(bound) ? bound : NaN;
  }
}
