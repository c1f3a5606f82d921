// Iso-surfaces of density maps, made here, so that the contour follows the hand.
import * as three from "./three.module.min.js";
import { css } from "./api.js";
import { fit, renderer, trackball } from "./cloud.js";

// Twice as fine, by cubic interpolation: (n, n, n) to (2 n - 1, ...), voxel i to 2 i.
export function finer(volume, n) {
  let shape = [n, n, n], from = volume;
  for (let axis = 0; axis < 3; axis++) {
    const to = shape.with(axis, 2 * n - 1), step = axis === 0 ? shape[1] * shape[2] : axis === 1 ? shape[2] : 1;
    const result = new Float32Array(to[0] * to[1] * to[2]), lines = from.length / n;
    for (let line = 0; line < lines; line++) {
      const low = line % step, start = (line - low) * n + low, target = (line - low) * (2 * n - 1) + low;
      for (let i = 0; i < n; i++) {
        const at = start + i * step, here = from[at], next = from[at + step];
        result[target + 2 * i * step] = here;
        if (i === n - 1) continue;
        const before = i ? from[at - step] : here, after = i < n - 2 ? from[at + 2 * step] : next;
        result[target + (2 * i + 1) * step] = (9 * (here + next) - before - after) / 16;
      }
    }
    [from, shape] = [result, to];
  }
  return from;
}

// Naive surface nets: one vertex in every cell that the surface crosses, at the mean of its crossings; a quad around
// every edge that it crosses.  volume (n, n, n) as (z, y, x); places (x, y, z) in voxels from ``middle``, over ``fine``.
export function surface(volume, n, level, middle, fine = 1) {
  const nn = n * n, number = new Int32Array(n * nn).fill(-1), corner = [0, 1, n, n + 1, nn, nn + 1, nn + n, nn + n + 1];
  const places = [], shades = [], faces = [], clamp = (v) => Math.max(1, Math.min(n - 2, Math.round(v)));
  const above = new Uint8Array(n * nn);
  for (let i = 0; i < above.length; i++) above[i] = volume[i] > level ? 1 : 0;
  for (let z = 0; z < n - 1; z++) for (let y = 0; y < n - 1; y++) for (let x = 0; x < n - 1; x++) {
    const at = z * nn + y * n + x, up = at + nn;
    const inside = above[at] | above[at + 1] << 1 | above[at + n] << 2 | above[at + n + 1] << 3 |
      above[up] << 4 | above[up + 1] << 5 | above[up + n] << 6 | above[up + n + 1] << 7;
    if (inside === 0 || inside === 255) continue;
    let sx = 0, sy = 0, sz = 0, count = 0;
    for (let c = 0; c < 8; c++) for (let bit = 1; bit < 8; bit <<= 1) {
      const d = c | bit;
      if (d === c || ((inside >> c) & 1) === ((inside >> d) & 1)) continue;
      const a = volume[at + corner[c]], t = (level - a) / (volume[at + corner[d]] - a);
      sx += (c & 1) + (bit === 1 ? t : 0);
      sy += ((c >> 1) & 1) + (bit === 2 ? t : 0);
      sz += ((c >> 2) & 1) + (bit === 4 ? t : 0);
      count++;
    }
    number[at] = places.length / 3;
    const px = x + sx / count, py = y + sy / count, pz = z + sz / count;
    places.push((px - middle) / fine, (py - middle) / fine, (pz - middle) / fine);
    // density in front of the surface means a crevice: darker
    const i = clamp(pz) * nn + clamp(py) * n + clamp(px), far = 3 * fine;
    const gx = volume[i - 1] - volume[i + 1], gy = volume[i - n] - volume[i + n], gz = volume[i - nn] - volume[i + nn];
    const out = far / (Math.hypot(gx, gy, gz) || 1);
    const front = volume[clamp(pz + gz * out) * nn + clamp(py + gy * out) * n + clamp(px + gx * out)];
    const shade = 1 - 0.6 * Math.min(1, Math.max(0, front / level + 0.1));
    shades.push(shade, shade, shade);
    if (!x || !y || !z) continue;
    const here = inside & 1;
    for (const [bit, u, v] of [[1, n, nn], [2, nn, 1], [4, 1, n]]) {
      if (here === (inside & (1 << bit) ? 1 : 0)) continue;
      const a = number[at], b = number[at - u], c = number[at - u - v], d = number[at - v];
      if (here) faces.push(a, b, c, a, c, d); else faces.push(a, c, b, a, d, c);
    }
  }
  return { places: new Float32Array(places), shades: new Float32Array(shades), faces: new Uint32Array(faces) };
}

const FINE = 72; // voxels: larger maps are fine enough, and would take too long

export class Molecule {
  constructor(canvas) {
    this.canvas = canvas;
    this.renderer = renderer(canvas, { antialias: true });
    this.scene = new three.Scene();
    this.camera = new three.OrthographicCamera();
    this.camera.position.z = 500;
    this.group = new three.Group();
    const key = new three.DirectionalLight(0xffffff, 2.2), fill = new three.DirectionalLight(0xffffff, 0.5);
    key.position.set(-1, 1.3, 1.6);
    fill.position.set(1.5, -0.5, 0.8);
    this.scene.add(this.group, key, fill, new three.HemisphereLight(0xffffff, 0xb8c4d4, 1.1));
    this.state = { turn: new three.Quaternion(), zoom: 1 };
    this.reach = 10;
    this.finer = new WeakMap();
    trackball(canvas, this.state, () => this.draw());
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  // layers: [{ volume, level, colour, glass, net }], the last two of which let others be seen; rough: in a hurry
  show(layers, n, rough = false) {
    for (const mesh of this.group.children) [mesh.geometry, mesh.material].forEach((part) => part.dispose());
    this.group.clear();
    for (const { volume, level, colour, glass, net } of layers) {
      const fine = n <= FINE && !rough && !net ? 2 : 1;
      if (fine === 2 && !this.finer.has(volume)) this.finer.set(volume, finer(volume, n));
      const { places, shades, faces } = fine === 2 ? surface(this.finer.get(volume), 2 * n - 1, level, 2 * (n >> 1), 2) :
        surface(volume, n, level, n >> 1);
      const geometry = new three.BufferGeometry();
      geometry.setAttribute("position", new three.BufferAttribute(places, 3));
      geometry.setAttribute("color", new three.BufferAttribute(shades, 3));
      geometry.setIndex(new three.BufferAttribute(faces, 1));
      geometry.computeVertexNormals();
      if (net) this.group.add(new three.Mesh(geometry, new three.MeshBasicMaterial({ color: colour, wireframe: true })));
      else this.group.add(new three.Mesh(geometry, new three.MeshPhongMaterial({ color: colour, vertexColors: true,
        shininess: 24, specular: 0x1c1c1c, transparent: Boolean(glass), opacity: glass ? 0.28 : 1,
        depthWrite: !glass })));
    }
    this.draw();
  }

  draw() {
    this.pending ??= requestAnimationFrame(() => {
      this.pending = undefined;
      const { clientWidth: width, clientHeight: height } = this.canvas;
      if (!width) return;
      fit(this.renderer, width, height);
      this.renderer.setClearColor(css("card"));
      const reach = this.reach / this.state.zoom, wide = Math.max(1, width / height), high = Math.max(1, height / width);
      Object.assign(this.camera, { left: -reach * wide, right: reach * wide, top: reach * high, bottom: -reach * high,
        near: 0.1, far: 1000 }).updateProjectionMatrix();
      this.group.quaternion.copy(this.state.turn);
      this.renderer.render(this.scene, this.camera);
    });
  }
}
