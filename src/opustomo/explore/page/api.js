// Asking the server: JSON, packets of a header and arrays, and what is said to the user.
export const $ = (id) => document.getElementById(id);
export const run = Number(new URLSearchParams(location.search).get("run") ?? 0);

const url = (name, query) => `/api/${run}/${name}?${new URLSearchParams(query)}`;

async function answered(response) {
  if (response.ok) return response;
  let words = response.statusText;
  try { words = (await response.json()).error; } catch { /* not one of ours: the status will do */ }
  throw new Error(words || `status ${response.status}`);
}

export const json = async (name, query = {}) => (await answered(await fetch(url(name, query)))).json();

// body: an array of row numbers, or an object
export async function post(name, body, query = {}) {
  const content = ArrayBuffer.isView(body) ? body : JSON.stringify(body);
  return (await answered(await fetch(url(name, query), { method: "POST", body: content }))).json();
}

// The header of a packet, and what follows as one array of this type.
export async function packet(name, query = {}, type = Float32Array) {
  const buffer = await (await answered(await fetch(url(name, query)))).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  return [JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length))), new type(buffer, 4 + length)];
}

export function keep(name, query) {
  const link = document.createElement("a");
  link.href = url(name, query);
  link.download = "";
  link.click();
}

let resting = "";

export function say(words, warn = false) {
  $("status").textContent = words || resting;
  $("status").classList.toggle("warn", warn);
}

// What stands there when there is nothing to say.
export function rest(words) {
  resting = words;
  say("");
}

addEventListener("error", (event) => say(event.error?.message ?? event.message, true)); // also of what fails before the page is up

// An event handler whose failure is told, not lost.
export const told = (work) => async (...given) => {
  try { return await work(...given); } catch (error) { say(error.message, true); }
};

export const make = (kind, properties = {}, ...inner) => {
  const node = Object.assign(document.createElement(kind), properties);
  node.append(...inner);
  return node;
};

export const short = (value) => Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ?
  value.toExponential(2) : String(Number(value.toPrecision(4)));

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
