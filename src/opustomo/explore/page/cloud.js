// Points in two or three dimensions, drawn by the graphics card: places and values are uploaded as they come.
import * as three from "./three.module.min.js";
import { css } from "./api.js";

const NOWHERE = -3e38; // in place of NaN, which shaders do not reliably know
const VIRIDIS = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"];

const VERTEX = `
attribute float px, py, pz, value, mark;
uniform mat4 frame; uniform vec2 range; uniform float size, dim, flat2d, hide; uniform vec3 faint; uniform sampler2D palette;
varying vec3 tone;
void main() {
  gl_Position = frame * vec4(px, py, pz, 1.0);
  if (px < -1e38 || py < -1e38 || (hide > 0.5 && value < -1e38)) gl_Position = vec4(9.0, 9.0, 9.0, 1.0);
  gl_PointSize = size * (dim > 0.5 && mark > 0.5 ? 1.3 : 1.0);
  float t = (value - range.x) / max(range.y - range.x, 1e-30);
  tone = value < -1e38 ? faint : texture2D(palette, vec2(clamp(t, 0.001, 0.999), 0.5)).rgb;
  if (dim > 0.5 && mark < 0.5) tone = mix(faint, tone, 0.12);
  if (flat2d > 0.5) gl_Position.z = (mark > 0.5 ? -0.5 : value < -1e38 ? 0.5 : 0.0) * gl_Position.w;
}`;
const FRAGMENT = `
varying vec3 tone;
void main() {
  vec2 p = gl_PointCoord - 0.5;
  if (dot(p, p) > 0.25) discard;
  gl_FragColor = vec4(tone, 1.0);
}`;

export const clean = (values) => {
  for (let i = 0; i < values.length; i++) if (values[i] !== values[i]) values[i] = NOWHERE;
  return values;
};

// Where nearly all values are: a thousandth at either end is beyond.
export function extent(values) {
  const step = Math.max(1, Math.floor(values.length / 20000)), some = [];
  for (let i = 0; i < values.length; i += step) if (values[i] > -1e38) some.push(values[i]);
  some.sort((a, b) => a - b);
  return some.length ? [some[Math.floor(0.001 * some.length)], some[Math.ceil(0.999 * (some.length - 1))]] : [0, 1];
}

// How many particles are near each, on a grid of the plane, smoothed.
export function density(x, y) {
  const m = 256, grid = new Float32Array(m * m), values = new Float32Array(x.length);
  const [[x0, x1], [y0, y1]] = [extent(x), extent(y)], fx = (m - 9) / (x1 - x0 || 1), fy = (m - 9) / (y1 - y0 || 1);
  const within = (v) => Math.max(0, Math.min(m - 1, v | 0));
  const cell = (i) => within((y[i] - y0) * fy + 4) * m + within((x[i] - x0) * fx + 4);
  for (let i = 0; i < x.length; i++) grid[cell(i)]++;
  const width = x.length > 20000 ? 1 : 3;
  for (const step of [1, m]) for (let pass = 0; pass < 2; pass++) {
    const old = grid.slice();
    for (let i = width * step; i < grid.length - width * step; i++) {
      let sum = 0;
      for (let k = -width; k <= width; k++) sum += old[i + k * step];
      grid[i] = sum / (2 * width + 1);
    }
  }
  for (let i = 0; i < x.length; i++) values[i] = Math.sqrt(grid[cell(i)]);
  return { values, names: null };
}

// colours: "#rrggbb" or [r, g, b] in 0..1; a name each, or a scale through them
export function palette(colours, smooth) {
  const rgb = colours.map((c) => typeof c === "string" ?
    [0, 2, 4].map((i) => parseInt(c.replace("#", "").slice(i, i + 2), 16)) : c.map((v) => Math.round(255 * v)));
  const width = smooth ? 256 : rgb.length, data = new Uint8Array(4 * width);
  for (let i = 0; i < width; i++) {
    const at = smooth ? (i / 255) * (rgb.length - 1) : i, low = Math.min(Math.floor(at), rgb.length - 1);
    const high = Math.min(low + 1, rgb.length - 1);
    for (let c = 0; c < 3; c++) data[4 * i + c] = rgb[low][c] + (at - low) * (rgb[high][c] - rgb[low][c]);
    data[4 * i + 3] = 255;
  }
  return data;
}
export const viridis = palette(VIRIDIS, true);

export function renderer(canvas, options) {
  try { return new three.WebGLRenderer({ canvas, ...options }); } catch {
    throw new Error("this browser has no WebGL: switch on its hardware acceleration, or open the link in another one");
  }
}

// A canvas that gets its size anew is made anew: only where it has changed.
export function fit(renderer, width, height) {
  const canvas = renderer.domElement, ratio = devicePixelRatio;
  if (canvas.width === Math.floor(width * ratio) && canvas.height === Math.floor(height * ratio)) return;
  renderer.setPixelRatio(ratio);
  renderer.setSize(width, height, false);
}

export class Cloud {
  constructor(canvas, flat) {
    this.canvas = canvas;
    this.renderer = renderer(canvas, { antialias: false, powerPreference: "high-performance" });
    this.scene = new three.Scene();
    this.camera = new three.Camera();
    this.geometry = new three.BufferGeometry();
    this.uniforms = { frame: { value: new three.Matrix4() }, range: { value: new three.Vector2(0, 1) }, size: { value: 3 },
      dim: { value: 0 }, flat2d: { value: flat ? 1 : 0 }, hide: { value: flat ? 0 : 1 }, faint: { value: new three.Color() },
      palette: { value: null } };
    const material = new three.ShaderMaterial({ uniforms: this.uniforms, vertexShader: VERTEX, fragmentShader: FRAGMENT });
    const points = new three.Points(this.geometry, material);
    points.frustumCulled = false;
    this.scene.add(points);
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  // x, y, z: (P,) each; NaN already cleaned
  place(x, y, z = new Float32Array(x.length)) {
    if (this.x?.length !== x.length) this.geometry.dispose();
    [this.x, this.y, this.z] = [x, y, z];
    for (const [name, values] of [["px", x], ["py", y], ["pz", z]]) this.set(name, values);
    this.geometry.setDrawRange(0, x.length);
    this.uniforms.size.value = Math.max(1.6, 15 * x.length ** -0.16) * devicePixelRatio;
  }

  set(name, values) {
    const old = this.geometry.getAttribute(name);
    if (old?.array.length === values.length && old.array.constructor === values.constructor) {
      if (old.array !== values) old.array = values;
      old.needsUpdate = true;
    } else this.geometry.setAttribute(name, new three.BufferAttribute(values, 1));
  }

  tint(values, low, high, data) {
    this.set("value", values);
    this.uniforms.range.value.set(low, high);
    this.uniforms.palette.value?.dispose();
    const texture = new three.DataTexture(data, data.length / 4, 1);
    texture.minFilter = texture.magFilter = three.NearestFilter;
    texture.needsUpdate = true;
    this.uniforms.palette.value = texture;
  }

  mark(marks, any) {
    this.set("mark", marks);
    this.uniforms.dim.value = any ? 1 : 0;
  }

  // One frame, at the next one that the browser shows.
  draw() {
    this.pending ??= requestAnimationFrame(() => {
      this.pending = undefined;
      const { clientWidth: width, clientHeight: height } = this.canvas;
      if (!width || !this.x || !this.geometry.getAttribute("mark")) return;
      fit(this.renderer, width, height);
      this.renderer.setClearColor(css("card"));
      this.uniforms.faint.value.set(css("faint")).convertLinearToSRGB();
      this.before?.(width, height);
      this.renderer.render(this.scene, this.camera);
      this.after?.(width, height);
    });
  }
}

// Turning by dragging, arrows, wheel; ``changed`` is called with the quaternion and the zoom in ``state``.
export function trackball(canvas, state, changed) {
  const turn = (x, y) => {
    const axis = new three.Vector3(y, x, 0), angle = axis.length();
    if (angle) state.turn.premultiply(new three.Quaternion().setFromAxisAngle(axis.normalize(), angle));
    changed();
  };
  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons) turn(event.movementX / 120, event.movementY / 120);
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    state.zoom *= Math.exp(-event.deltaY / 600);
    changed();
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (arrow) turn(arrow[0] / 8, arrow[1] / 8);
    else if (event.key === "+" || event.key === "-") state.zoom *= event.key === "+" ? 1.15 : 1 / 1.15;
    else if (event.key === "0") [state.turn, state.zoom] = [new three.Quaternion(), 1];
    else return;
    event.preventDefault();
    changed();
  });
}
