// The page: what is shown, what is selected, and how the parts are tied together.
import { $, css, json, keep, make, packet, post, rest, run, say, short, told } from "./api.js";
import { axes, prepared } from "./charts.js";
import { Cloud, density, extent, palette, viridis } from "./cloud.js";
import { watch } from "./live.js";
import { Map3d } from "./map.js";
import { cube, neighbour, particle, space } from "./particles.js";
import { column, columns, fill, selection, state } from "./state.js";

const ORDER = ["umap:1", "umap:2", "pc:1", "pc:2", "z:1", "z:2"];

function offer() {
  const all = Object.entries(state.columns), entry = ([name, { label, heading }]) => [name, label, heading];
  const numbers = all.filter(([, { names }]) => !names).map(entry);
  const usual = ORDER.filter((name) => state.columns[name]);
  fill($("x"), numbers, $("x").value || usual[0]);
  fill($("y"), numbers, $("y").value || usual[1] || usual[0]);
  const first = all.map(([name]) => name).filter((name) => /^class:\w+$/.test(name)).at(-1); // of all particles
  fill($("colour"), [["density", "density of the points"], ...all.map(entry)], $("colour").value || first);
}

// --- the plane of codes ----------------------------------------------------------------------------------------

const cloud = new Cloud($("points"), true);
const view = { x: 0, y: 0, sx: 1, sy: 1 };

function home() {
  for (const [axis, values] of [["x", cloud.x], ["y", cloud.y]]) {
    const [low, high] = extent(values);
    view[axis] = (low + high) / 2;
    view[`s${axis}`] = 1.8 / (high - low || 1);
  }
  cloud.draw();
}

cloud.before = () => cloud.uniforms.frame.value.set(
  view.sx, 0, 0, -view.x * view.sx, 0, view.sy, 0, -view.y * view.sy, 0, 0, 1, 0, 0, 0, 0, 1);
const screen = (i, width, height) => [
  ((cloud.x[i] - view.x) * view.sx + 1) * width / 2, (1 - (cloud.y[i] - view.y) * view.sy) * height / 2];

// Axes, the way, what is being drawn: over the points.
function ink() {
  const [pen, width, height] = prepared($("ink"));
  axes(pen, width, height, [view.x - 1 / view.sx, view.x + 1 / view.sx, view.y - 1 / view.sy, view.y + 1 / view.sy],
    [$("x").selectedOptions[0]?.label ?? "", $("y").selectedOptions[0]?.label ?? ""]);
  pen.strokeStyle = pen.fillStyle = css("ink");
  pen.lineWidth = 1.5;
  if (state.path.length) {
    pen.beginPath();
    state.path.forEach((row, i) => pen[i ? "lineTo" : "moveTo"](...screen(row, width, height)));
    pen.stroke();
  }
  for (const row of state.picked >= 0 ? [...state.path, state.picked] : state.path) {
    pen.beginPath();
    pen.arc(...screen(row, width, height), 7, 0, 7);
    pen.stroke();
  }
  if (state.drawn?.length > 1) {
    pen.fillStyle = css("accent") + "22";
    pen.strokeStyle = css("accent");
    pen.fill(outline(state.drawn));
    pen.stroke(outline(state.drawn));
  }
}

cloud.after = () => {
  ink();
  if (!state.painted) { state.painted = true; performance.mark("first-points"); }
};

const outline = (points) => new Path2D(`M${points.map((p) => p.join(",")).join("L")}Z`);

async function place() {
  const names = [$("x").value, $("y").value], [x, y] = await Promise.all(names.map(column));
  if ($("x").value !== names[0] || $("y").value !== names[1]) return;
  const other = cloud.x !== x.values || cloud.y !== y.values;
  cloud.place(x.values, y.values);
  if (other) home();
  if ($("colour").value === "density") await colour();
  cloud.draw();
}

async function colour() {
  const name = $("colour").value;
  const found = name === "density" ? density(cloud.x, cloud.y) : await column(name);
  if ($("colour").value !== name) return; // another one has been chosen meanwhile
  state.label = found;
  if (found.names) cloud.tint(found.values, -0.5, found.names.length - 0.5, palette(found.colours, false));
  else {
    const [low, high] = extent(found.values);
    Object.assign(found, { low, high });
    cloud.tint(found.values, low, high > low ? high : low + 1, viridis);
  }
  legend();
  cloud.draw();
}

function legend() {
  const { values, names, colours, low, high } = state.label, rgb = (c) => `rgb(${c.map((v) => Math.round(255 * v))})`;
  if (names) {
    const sizes = new Array(names.length).fill(0);
    for (const v of values) if (v >= 0) sizes[v]++;
    $("legend").replaceChildren(...names.map((label, i) => {
      const dot = make("i");
      dot.style.background = rgb(colours[i]);
      return make("button", { title: `Select ${label}`, onclick: () => choose((row) => values[row] === i) },
        dot, label, make("em", { textContent: sizes[i].toLocaleString("en") }));
    }));
    return;
  }
  const bar = make("canvas", { width: 256, height: 1 }), pen = bar.getContext("2d");
  pen.putImageData(new ImageData(new Uint8ClampedArray(viridis), 256, 1), 0, 0);
  const [from, to] = [[low, "from"], [high, "to"]].map(([value, ariaLabel]) =>
    make("input", { type: "number", step: "any", value: short(value), ariaLabel }));
  const button = make("button", { textContent: "Select this range", id: "range",
    onclick: () => choose((row) => values[row] >= Number(from.value) && values[row] <= Number(to.value)) });
  $("legend").replaceChildren(make("div", { className: "scale" }, bar, from, to, button));
}

// --- the selection ---------------------------------------------------------------------------------------------

const past = [], future = [], ROOM = 64e6; // bytes that undo may take

function change(next) {
  past.push(state.marks);
  while (past.length > Math.max(2, ROOM / state.marks.length)) past.shift();
  future.length = 0;
  show(next);
}

function show(next) {
  state.marks = next;
  let count = 0;
  for (const m of state.marks) count += m;
  $("count").textContent = count ? `${count.toLocaleString("en")} selected` : "nothing selected";
  $("keep").disabled = !count;
  $("undo").disabled = !past.length;
  $("redo").disabled = !future.length;
  cloud.mark(state.marks, count > 0);
  cloud.draw();
  if (!$("tomograms").hidden) space();
}

// The rows that a test takes, joined with the selection as the menu says.
function choose(test) {
  const { marks } = state, next = new Uint8Array(marks.length);
  const join = { replace: (old, hit) => hit, add: (old, hit) => old | hit, subtract: (old, hit) => old & ~hit,
    intersect: (old, hit) => old & hit }[$("mode").value];
  for (let i = 0; i < next.length; i++) next[i] = join(marks[i], test(i) ? 1 : 0);
  change(next);
}

async function chooseRows(address, query) {
  const rows = new Set((await packet(address, query, Uint32Array))[1]);
  choose((row) => rows.has(row));
}

function back(from, to) {
  if (!from.length) return;
  to.push(state.marks);
  show(from.pop());
}

// Points inside an outline in pixels, by painting it: as exact as the hand that drew it.
function inside(points) {
  performance.mark("lasso-begin");
  const { clientWidth: width, clientHeight: height } = $("points");
  const pen = make("canvas", { width, height }).getContext("2d", { willReadFrequently: true });
  pen.fill(outline(points));
  const painted = pen.getImageData(0, 0, width, height).data, { x, y } = cloud;
  const ax = view.sx * width / 2, bx = width / 2 - view.x * ax, ay = -view.sy * height / 2, by = height / 2 - view.y * ay;
  choose((i) => {
    const u = (x[i] * ax + bx) | 0, v = (y[i] * ay + by) | 0;
    return u >= 0 && v >= 0 && u < width && v < height && painted[4 * (v * width + u) + 3] > 127;
  });
  performance.measure("lasso-choice", "lasso-begin");
  // until it is seen
  requestAnimationFrame(() => requestAnimationFrame(() => performance.measure("lasso", "lasso-begin")));
}

function nearestTo(px, py) {
  const { clientWidth: width, clientHeight: height } = $("points");
  let best = -1, least = 12 ** 2;
  for (let i = 0; i < cloud.x.length; i++) {
    const dx = ((cloud.x[i] - view.x) * view.sx + 1) * width / 2 - px;
    const dy = (1 - (cloud.y[i] - view.y) * view.sy) * height / 2 - py;
    if (dx * dx + dy * dy < least) { best = i; least = dx * dx + dy * dy; }
  }
  return best;
}

// --- the pointer and the keys ----------------------------------------------------------------------------------

const HINTS = { pick: "Click a particle to see its map. Drag moves, the wheel zooms.", lasso: "Draw around particles.",
  box: "Drag a box over particles.", path: "Click the particles that the way is to pass, or Enter for the picked one." };

function tool(name) {
  state.tool = $("points").dataset.tool = name;
  for (const button of $("tools").children) button.setAttribute("aria-pressed", button.dataset.tool === name);
  rest(HINTS[name]);
  if (name === "path") { state.path = []; cloud.draw(); }
}

function pick(row) {
  state.picked = row;
  $("row").value = row + 1;
  cloud.draw();
  return Promise.all([map.show(`row:${row}`, `particle ${row + 1}`), $("particle").hidden || particle()]);
}

function pass(row) {
  if (row >= 0 && state.path.at(-1) !== row) state.path.push(row);
  cloud.draw();
  if (state.path.length > 1) return map.way(state.path);
}

function pointers() {
  const canvas = $("points"), at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  let start = null;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    start = at(event);
    if (state.tool === "lasso" || state.tool === "box") state.drawn = [start];
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!start) return;
    const here = at(event);
    if (state.tool === "lasso" || state.tool === "box") {
      if (state.tool === "box") state.drawn = [start, [here[0], start[1]], here, [start[0], here[1]]];
      else state.drawn.push(...(event.getCoalescedEvents?.() ?? []).map(at), here); // of a slow frame, too
      state.inked ??= requestAnimationFrame(() => { state.inked = undefined; ink(); }); // the points stay as they are
      return;
    }
    view.x -= event.movementX / canvas.clientWidth * 2 / view.sx;
    view.y += event.movementY / canvas.clientHeight * 2 / view.sy;
    cloud.draw();
  });
  canvas.addEventListener("pointerup", told(async (event) => {
    const [from, to, drawn] = [start, at(event), state.drawn];
    [start, state.drawn] = [null, null];
    if (!from) return;
    if (drawn) {
      if (drawn.length > 2) inside(drawn); else ink();
      return;
    }
    if (Math.hypot(to[0] - from[0], to[1] - from[1]) > 4) return;
    const row = nearestTo(...to);
    if (row < 0) return;
    return state.tool === "path" ? pass(row) : pick(row);
  }));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 500), ...at(event));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (arrow) { view.x += arrow[0] / 5 / view.sx; view.y += arrow[1] / 5 / view.sy; cloud.draw(); }
    else if (event.key === "+") zoom(1.25, canvas.clientWidth / 2, canvas.clientHeight / 2);
    else if (event.key === "-") zoom(0.8, canvas.clientWidth / 2, canvas.clientHeight / 2);
    else if (event.key === "0") home();
    else if (event.key === "Enter" && state.tool === "path") pass(state.picked);
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const key = event.key.toLowerCase(), ctrl = event.ctrlKey || event.metaKey;
    if (ctrl && key === "z") back(...(event.shiftKey ? [future, past] : [past, future]));
    else if (ctrl && key === "y") back(future, past);
    else if (ctrl || event.altKey) return;
    else if (key in { p: 1, l: 1, b: 1, w: 1 }) tool({ p: "pick", l: "lasso", b: "box", w: "path" }[key]);
    else if (key === "i") $("invert").click();
    else if (key === "escape") { state.path = []; $("clear").click(); }
    else return;
    event.preventDefault();
  });
}

function zoom(factor, px, py) {
  const u = 2 * px / $("points").clientWidth - 1, v = 1 - 2 * py / $("points").clientHeight;
  view.x += u / view.sx * (1 - 1 / factor);
  view.y += v / view.sy * (1 - 1 / factor);
  view.sx *= factor;
  view.sy *= factor;
  cloud.draw();
}

// --- what is kept -------------------------------------------------------------------

function kept(names) {
  state.about.selections = names;
  const ask = (name, address, more) => told(async () => {
    const job = await post(address, { selection: name, ...more() }, { epoch: state.epoch });
    line(job.command);
    say(`${job.title}: begun`);
    await jobs();
  });
  map.offer([...state.about.maps, ...names.map((name) => [`selection:${name}`, `mean of ${name}`])]);
  const none = make("p", { className: "note",
    textContent: "None kept yet: choose particles on the left and give the choice a name." });
  $("kept").replaceChildren(...(names.length ? [] : [none]), ...names.map((name) => make("div", { className: "item bar" },
    make("b", { textContent: name }),
    make("button", { textContent: "Select", onclick: told(() => chooseRows("selection", { name })) }),
    make("button", { textContent: "Write STAR",
      onclick: ask(name, "export", () => ({ corrected: $("corrected").checked })) }),
    make("button", { textContent: "Classify again",
      onclick: ask(name, "analyze", () => ({ clusters: Number($("clusters").value), umap: $("umap").checked })) }))));
}

function line(text) {
  $("line").textContent = text;
  document.querySelector("[data-of=line]").hidden = !text;
}

const ended = new Set();
async function jobs() {
  const found = await json("jobs");
  $("busy").hidden = !found.length;
  const file = (job, name) => make("button", { textContent: name, title: `Download ${name}`,
    onclick: () => keep("file", { job: job.number, name }) });
  $("jobs").replaceChildren(...found.reverse().map((job) => make("div", { className: "item" },
    make("div", { textContent: `${job.title}: ${job.state} ${job.seconds ? `in ${short(job.seconds)} s` : ""} ${job.message}` }),
    ...job.files.filter((name) => !/^reference\d/.test(name)).flatMap((name) => [file(job, name), " "]),
    make("div", { className: "bar" }, make("code", { textContent: job.command })))));
  for (const job of found) if ((job.state === "done" || job.state === "failed") && !ended.has(job.number)) {
    ended.add(job.number);
    say(`${job.title}: ${job.state} ${job.message}`, job.state === "failed");
    if (job.title.includes("classes of") && job.state === "done") await told(open)(state.epoch);
  }
  if (found.some((job) => job.state === "waiting" || job.state === "running")) setTimeout(told(jobs), 700);
}

// --- tabs, buttons, beginning ----------------------------------------------------------------------------------

function tab(name) {
  for (const button of $("tabs").children) {
    const own = button.id === `tab-${name}`;
    button.setAttribute("aria-selected", own);
    button.tabIndex = own ? 0 : -1;
    $(button.getAttribute("aria-controls")).hidden = !own;
  }
  const work = { particle: () => pick(Number($("row").value) - 1), tomograms: space, act: jobs, map: () => map.redraw() }[name];
  if (work && state.about) told(work)();
}

const map = new Map3d({ epoch: () => state.epoch, jobs: () => { tab("act"); return jobs(); } });

function wire() {
  for (const button of $("tools").children) button.onclick = () => tool(button.dataset.tool);
  for (const button of $("tabs").children) {
    button.onclick = () => tab(button.id.slice(4));
    button.onkeydown = (event) => {
      const next = { ArrowRight: button.nextElementSibling, ArrowLeft: button.previousElementSibling }[event.key];
      if (next) { next.focus(); next.click(); }
    };
  }
  $("x").onchange = $("y").onchange = told(place);
  $("colour").onchange = told(async () => { await colour(); if (!$("tomograms").hidden) await space(); });
  $("invert").onclick = () => change(state.marks.map((m) => 1 - m));
  $("clear").onclick = () => change(new Uint8Array(state.marks.length));
  $("undo").onclick = () => back(past, future);
  $("redo").onclick = () => back(future, past);
  $("nearest").onclick = told(async () => {
    if (state.picked < 0) throw new Error("pick a particle first: the nearest to it are meant");
    await chooseRows("nearest", { row: state.picked, k: $("k").value, epoch: state.epoch });
  });
  $("keep").onclick = () => { tab("act"); $("name").focus(); };
  $("row").onchange = told(() => pick(Number($("row").value) - 1));
  $("before").onclick = told(() => pick(neighbour(-1)));
  $("next").onclick = told(() => pick(neighbour(1)));
  $("tomogram").onchange = told(space);
  $("save").onsubmit = told(async (event) => {
    event.preventDefault();
    const rows = selection();
    if (!rows.length) throw new Error("nothing is selected yet");
    const answer = await post("selection", rows, { name: $("name").value });
    kept(answer.selections);
    line(answer.command);
    say(`${rows.length.toLocaleString("en")} particles kept as ${$("name").value}`);
  });
  for (const button of document.querySelectorAll(".copy")) button.onclick = told(async () => {
    await navigator.clipboard.writeText($(button.dataset.of).textContent);
    say("copied");
  });
  $("epoch").onchange = told(() => open(Number($("epoch").value)));
  $("run").onchange = () => { location.search = `?run=${$("run").value}`; };
  matchMedia("(prefers-color-scheme: dark)").onchange = () => { cloud.draw(); cube.draw(); map.redraw(); };
}

// Show an epoch (-1: the latest); the selection stays, it is of particles.
async function open(epoch) {
  const about = await json("about", { epoch });
  state.about = about;
  state.epoch = about.epoch;
  columns.clear();
  state.columns = about.columns;
  $("title").textContent = about.name;
  document.title = `${about.name} · opustomo explore`;
  $("about").textContent = `${about.particles.toLocaleString("en")} particles · ${about.pixel.toFixed(2)} Å voxels`;
  fill($("epoch"), about.epochs.map((e) => [String(e), e]), String(about.epoch));
  $("empty").hidden = true;
  offer();
  if (state.marks.length !== about.particles) {
    state.marks = new Uint8Array(about.particles);
    past.length = future.length = 0;
  }
  cloud.mark(state.marks, state.marks.some(Boolean));
  if ($("colour").value !== "density") column($("colour").value).catch(() => {}); // comes while the points are placed
  await place();
  await colour();
  show(state.marks);
  kept(about.selections);
  await map.show($("what").value || "mean");
  json("columns", { epoch: about.epoch }).then((more) => {
    state.columns = { ...about.columns, ...more };
    offer();
  }).catch((error) => say(error.message, true));
}

wire();
tool("pick");
tab("map");
pointers();
history.replaceState(null, "", `/?run=${run}`);
fetch("/api/runs").then((answer) => answer.json()).then((runs) => {
  fill($("run"), runs.map((path, i) => [String(i), path]), String(run));
  $("runs").hidden = runs.length < 2;
});
told(async () => {
  try {
    if (!(await json("live")).epochs.length)
      throw new Error("No epoch has ended yet. Training is shown meanwhile; the codes come by themselves.");
    await open(-1);
  } catch (error) {
    $("empty").hidden = false;
    $("empty").textContent = error.message;
    tab("live");
  }
  watch(async (latest) => { if (latest !== state.epoch) await open(latest); });
})();
