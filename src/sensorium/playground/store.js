// What several views share: the server's models, the chosen one, and whether it answers.

const watchers = new Set();
let state = {models: [], model: "", phase: "loading"};

export const get = () => state;

export function set(change) {
  state = {...state, ...change};
  for (const watcher of watchers) watcher(state);
}

/** Calls `watcher` now and after every change. */
export function watch(watcher) {
  watchers.add(watcher);
  watcher(state);
}

/** The chosen model's entry of /v1/models. */
export const model = () => state.models.find((entry) => entry.id === state.model);

/** Does the chosen model take this kind of input? */
export const takes = (kind) => model()?.modalities?.includes(kind) ?? false;

/** Is one of these tasks among what the chosen model does? */
export const does = (...tasks) => tasks.some((task) => model()?.tasks?.includes(task));
