// A particle with its pictures, and the tomograms that particles lie in.
import { $, make, packet, short } from "./api.js";
import { grey } from "./charts.js";
import { Cloud, palette, trackball, viridis } from "./cloud.js";
import { column, fill, selection, state } from "./state.js";
import * as three from "./three.module.min.js";

export async function particle() {
  const row = Number($("row").value) - 1;
  const [facts, values] = await packet("particle", { row, epoch: state.epoch });
  const list = (v) => v?.map((value) => value.toFixed(2)).join(", ");
  const line = (name, ...values) => make("tr", {}, make("th", { textContent: name, scope: "row" }),
    ...values.map((value) => make("td", { textContent: value ?? "not known" })));
  const head = ["pose", "in the STAR file", "of this run", "difference"].map((textContent) => make("th", { textContent, scope: "col" }));
  const moved = facts.turn === undefined ? [] : [`${short(facts.turn)}°`, `${short(facts.shift)} Å`];
  $("facts").replaceChildren(make("table", {}, make("tr", {}, ...head),
    line("rot, tilt, psi (°)", list(facts.euler_given), list(facts.euler), moved[0]),
    line("origin (pixels)", list(facts.origin_given), list(facts.origin), moved[1])),
  make("p", { className: "note", textContent: [
    facts.tomogram && `${facts.tomogram}, at x, y, z = ${facts.place.map((v) => v.toFixed(0)).join(", ")} Å`,
    ...facts.notes.map((note) => `Not shown: ${note}`)].filter(Boolean).join(" · ") }));
  let offset = 0;
  $("pictures").replaceChildren(...facts.pictures.map(({ title, width, height }) => {
    const canvas = make("canvas", { width, height, role: "img", ariaLabel: title }), pen = canvas.getContext("2d");
    const part = values.subarray(offset, offset + width * height), sorted = part.slice().sort();
    offset += width * height;
    const [low, high] = [0.01, 0.99].map((q) => sorted[Math.floor(q * (sorted.length - 1))]);
    pen.putImageData(grey(pen.createImageData(width, height), part, 0, 1, low, high), 0, 0);
    return make("figure", {}, canvas, make("figcaption", { textContent: title }));
  }));
}

// The row before or after the one that is shown, of those that are selected where there are any.
export function neighbour(step) {
  const rows = selection(), now = Number($("row").value) - 1, count = state.marks.length;
  let next = (now + step + count) % count;
  if (rows.length) {
    const after = rows.findIndex((row) => row >= now); // itself, or the first beyond it
    const at = after < 0 ? 0 : rows[after] === now || step < 0 ? after + step : after;
    next = rows[(at + rows.length) % rows.length];
  }
  return next;
}

export const cube = new Cloud($("space"), false);
const tilted = new three.Quaternion().setFromEuler(new three.Euler(-0.9, 0, 0.4));
const turn = { turn: tilted, zoom: 1, middle: new three.Vector3(), size: 1 };
trackball($("space"), turn, () => cube.draw());
cube.before = (width, height) => {
  const scale = turn.zoom * 1.7 / turn.size, least = Math.min(width, height);
  cube.uniforms.frame.value.makeScale(scale * least / width, scale * least / height, -scale / 20)
    .multiply(new three.Matrix4().makeRotationFromQuaternion(turn.turn))
    .multiply(new three.Matrix4().makeTranslation(turn.middle.clone().negate()));
  cube.camera.projectionMatrix.copy(cube.uniforms.frame.value);
};

const frame = new three.Box3Helper(new three.Box3(), 0x888888); // around all that are in the tomogram
frame.frustumCulled = false;
cube.scene.add(frame);

export async function space() {
  if (!state.columns.tomogram) {
    const words = "The STAR file does not say where the particles are.";
    $("shares").replaceChildren(make("tr", {}, make("td", { textContent: words })));
    return;
  }
  const [where, ...xyz] = await Promise.all(["tomogram", "place:x", "place:y", "place:z"].map(column));
  const total = new Array(where.names.length).fill(0), chosen = total.slice(), any = state.marks.some(Boolean);
  for (let i = 0; i < state.marks.length; i++) { total[where.values[i]]++; chosen[where.values[i]] += state.marks[i]; }
  if ($("tomogram").options.length !== where.names.length) fill($("tomogram"), where.names.map((name, i) => [i, name]));
  if (state.picked >= 0 && state.tomogram !== state.picked) $("tomogram").value = where.values[state.tomogram = state.picked];
  const rows = [];
  where.values.forEach((value, row) => { if (value === Number($("tomogram").value)) rows.push(row); });
  const part = (values) => Float32Array.from(rows, (row) => values[row]), [x, y, z] = xyz.map((c) => part(c.values));
  const point = new three.Vector3(), size = new three.Vector3();
  frame.box.makeEmpty();
  rows.forEach((_, i) => frame.box.expandByPoint(point.set(x[i], y[i], z[i])));
  frame.box.getCenter(turn.middle);
  frame.box.getSize(size);
  turn.size = size.length() || 1;
  $("span").textContent = `${rows.length.toLocaleString("en")} particles within ${size.toArray().map((v) => v.toFixed(0)).join(" × ")} Å`;
  cube.place(x, y, z);
  const { names, colours, low, high } = state.label;
  cube.tint(part(state.label.values), ...(names ? [-0.5, names.length - 0.5, palette(colours, false)] : [low, high, viridis]));
  cube.mark(Uint8Array.from(rows, (row) => state.marks[row]), any);
  cube.uniforms.size.value = Math.max(4, 40 * rows.length ** -0.3) * devicePixelRatio;
  cube.draw();
  const titles = ["tomogram", "particles", "selected", "share"];
  const head = make("tr", {}, ...titles.map((textContent) => make("th", { textContent, scope: "col" })));
  const order = where.names.map((_, i) => i).sort((a, b) => chosen[b] / total[b] - chosen[a] / total[a]);
  $("shares").replaceChildren(head, ...order.map((i) => make("tr", {}, make("td", { textContent: where.names[i] }),
    make("td", { className: "n", textContent: total[i] }), make("td", { className: "n", textContent: chosen[i] }),
    make("td", {}, make("progress", { value: chosen[i] / total[i], ariaHidden: "true" }),
      ` ${(100 * chosen[i] / total[i]).toFixed(1)} %`))));
}
