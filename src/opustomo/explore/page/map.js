// The map panel: which map, its surface and sections, another one beside it, series.
import { $, json, keep, packet, post, say, short, told } from "./api.js";
import { curves, sections } from "./charts.js";
import { Molecule } from "./molecule.js";

const SERIES = /^(pc|motion|path|between):/;
const KEPT = 48; // maps in the page's memory
const BLUE = "#0072b2", ORANGE = "#d55e00";

export class Map3d {
  constructor({ epoch, jobs }) {
    [this.epoch, this.jobs] = [epoch, jobs];
    this.molecule = new Molecule($("molecule"));
    this.maps = new Map();
    this.at = "mean";
    this.rows = [];
    $("what").onchange = told(() => this.show($("what").value));
    $("step").oninput = told(() => this.load());
    $("n").onchange = told(() => this.show(this.at));
    $("play").onclick = () => this.play();
    $("level").oninput = () => this.redraw(true); // follows the hand, and becomes smooth when it rests
    $("level").onchange = $("tint").oninput = $("show").onchange = () => this.redraw();
    $("depth").oninput = () => this.cut();
    $("hold").onclick = told(() => this.hold());
    $("mrc").onclick = () => keep("mrc", this.query());
    $("movie").onclick = told(async () => {
      const job = await post("movie", { at: this.at, n: Number($("n").value), level: this.level() }, { epoch: this.epoch() });
      say(`${job.title}: begun`);
      await this.jobs();
    });
    new ResizeObserver(() => { if (this.now) this.cut(); }).observe($("slices"));
  }

  query(at = this.at, i = $("step").value) {
    return SERIES.test(at) ? { at, i, n: $("n").value, epoch: this.epoch() } : { at, epoch: this.epoch() };
  }

  offer(entries) {
    this.entries = entries;
    this.menu();
  }

  // What the run has, and the way and the particle chosen last.
  menu() {
    const rows = this.rows.join("-"), own = [];
    if (this.row) own.push(this.row);
    if (rows) own.push([`path:${rows}`, "way through particles"], [`between:${rows}`, "straight way"]);
    $("what").replaceChildren(...[...own, ...(this.entries ?? [])].map(([value, label]) => new Option(label, value)));
    $("what").value = this.at;
  }

  way(rows) {
    this.rows = rows.slice();
    return told(() => this.show(`path:${rows.join("-")}`))();
  }

  async show(at, label) {
    this.at = at;
    if (label) this.row = [at, label];
    this.menu();
    if ($("what").value !== at) $("what").value = this.at = at = "mean";
    const series = SERIES.test(at);
    $("series").hidden = $("movie").hidden = !series;
    $("step").max = Number($("n").value) - 1;
    if (series) $("step").value = 0;
    await this.load();
  }

  async fetched(query) {
    const key = JSON.stringify(query);
    if (!this.maps.has(key)) {
      const [header, volume] = await packet("map", query);
      let top = 0;
      for (const v of volume) if (v > top) top = v;
      this.maps.set(key, { ...header, volume, top });
      while (this.maps.size > KEPT) this.maps.delete(this.maps.keys().next().value);
    }
    return this.maps.get(key);
  }

  async load() {
    const asked = this.query(), key = JSON.stringify(asked);
    this.wanted = key;
    if (!this.maps.has(key)) say("decoding ...");
    const map = await this.fetched(asked);
    if (this.wanted !== key) return; // another one has been asked for meanwhile
    if ($("status").textContent === "decoding ...") say("");
    const first = !this.now || this.now.size !== map.size;
    this.now = map;
    if (first) { $("level").value = 1000 * map.level / map.top; this.molecule.reach = map.reach; }
    $("command").textContent = map.command;
    document.querySelector("[data-of=command]").hidden = !map.command;
    this.redraw();
    if (this.held) await this.compare();
    performance.mark("map-shown");
  }

  level() {
    return Math.max(0.002, Number($("level").value) / 1000) * this.now.top;
  }

  redraw(rough = false) {
    if (!this.now || $("map").hidden) return;
    const { volume, size } = this.now, level = this.level(), colour = $("tint").value, show = $("show").value;
    const layers = [{ volume, level, colour }];
    if (this.held && show === "both") layers.push({ volume: this.held.volume, level, colour: ORANGE, net: true });
    if (this.held && show === "difference") {
      const less = volume.map((v, i) => v - this.held.volume[i]);
      let top = 0;
      for (const v of less) top = Math.max(top, Math.abs(v));
      layers[0] = { volume, level, colour: "#9aa5b1", glass: true };
      const minus = less.map((v) => -v);
      layers.unshift({ volume: less, level: top / 3, colour: BLUE }, { volume: minus, level: top / 3, colour: ORANGE });
      [this.less, this.apart] = [less, short(top / 3)];
    }
    this.molecule.show(layers, size, rough);
    $("told").textContent = short(level);
    $("caption").textContent = this.now.title + { one: "", both: ` · orange net: ${this.held?.title}`,
      difference: ` less ${this.held?.title} · blue: above ${this.apart}, orange: below -${this.apart}` }[show];
    this.cut();
  }

  cut() {
    if (!this.now) return;
    const difference = this.held && $("show").value === "difference";
    const [low, high] = this.now.limits, reach = (high - low) / 3;
    const [volume, range] = difference ? [this.less, [-reach, reach]] : [this.now.volume, [low, high]];
    sections($("slices"), volume, this.now.size, Number($("depth").value) / 1000, range);
  }

  async hold() {
    this.held = this.held ? null : { ...this.now, query: this.query() };
    $("hold").textContent = this.held ? "Stop comparing" : "Keep to compare";
    $("show").hidden = !this.held;
    $("show").value = this.held ? "both" : "one";
    $("fsc").hidden = !this.held;
    if (this.held) say(`${this.held.title} is kept to compare with: choose another map`);
    this.redraw();
    if (this.held) await this.compare();
  }

  async compare() {
    const a = this.query(), b = this.held.query;
    const query = { a: a.at, b: b.at, ia: a.i ?? 0, ib: b.i ?? 0, n: $("n").value, epoch: this.epoch() };
    const { frequency, fsc } = await json("fsc", query);
    const below = fsc.findIndex((v, i) => i && v < 0.5), end = frequency[below < 0 ? fsc.length - 1 : below];
    const name = `${below < 0 ? "above 0.5 to" : "0.5 at"} ${(1 / end).toFixed(1)} Å`;
    curves($("fsc"), [{ x: frequency, y: fsc, colour: BLUE, name }], ["1/Å", "FSC"], [Math.min(0, ...fsc), 1.3]);
  }

  async play() {
    this.playing = !this.playing;
    $("play").textContent = this.playing ? "Stop" : "Play";
    let step = 1;
    while (this.playing && SERIES.test(this.at)) {
      const last = Number($("step").max), now = Number($("step").value);
      if (now + step > last || now + step < 0) step = -step;
      $("step").value = now + step;
      try { await this.load(); } catch (error) { say(error.message, true); break; }
      await new Promise((done) => setTimeout(done, 150));
    }
    this.playing = false;
    $("play").textContent = "Play";
  }
}
