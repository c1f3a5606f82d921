// What the parts of the page share: what is shown, and what is selected.
import { make, packet } from "./api.js";
import { clean } from "./cloud.js";

export const state = { marks: new Uint8Array(0), // 1 for every particle that is selected
  about: null, epoch: -1, columns: {}, picked: -1, path: [], tool: "pick", label: null, tomogram: null };
export const columns = new Map(); // by name, of the epoch shown: promises of { values, names, colours }

export function column(name) {
  if (!columns.has(name)) {
    const coming = packet("column", { name, epoch: state.epoch })
      .then(([header, values]) => ({ ...header, values: clean(values) }));
    coming.catch(() => columns.delete(name));
    columns.set(name, coming);
  }
  return columns.get(name);
}

// Entries [value, label, heading]; those of a heading stand together under it.
export function fill(select, entries, chosen) {
  const groups = new Map();
  select.replaceChildren();
  for (const [value, label, heading] of entries) {
    if (heading && !groups.has(heading)) {
      groups.set(heading, make("optgroup", { label: heading }));
      select.append(groups.get(heading));
    }
    (groups.get(heading) ?? select).append(make("option", { value, textContent: label }));
  }
  if (entries.some(([value]) => value === chosen)) select.value = chosen;
}

// Rows that are selected.
export const selection = () => {
  const rows = new Uint32Array(state.marks.reduce((sum, m) => sum + m, 0));
  for (let i = 0, at = 0; i < state.marks.length; i++) if (state.marks[i]) rows[at++] = i;
  return rows;
};
