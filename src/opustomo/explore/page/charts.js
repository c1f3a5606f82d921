// Small drawings on plain canvases: axes, curves, grey pictures.
import { css, short } from "./api.js";

export function prepared(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas, scale = devicePixelRatio;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.font = "11px system-ui, sans-serif";
  return [pen, width, height];
}

export function ticks(low, high, about) {
  const raw = (high - low) / Math.max(about, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((s) => s * power >= raw);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high && found.length < 50; v += step) found.push(Number(v.toPrecision(10)));
  return found;
}

const told = (v) => String(v).length < 8 ? String(v) : short(v); // of a tick, with all its digits where there are few

// Grid and numbers of a box [left, right] x [bottom, top] of values over the whole canvas.
export function axes(pen, width, height, [left, right, bottom, top], names, margin = 0) {
  pen.fillStyle = css("muted");
  pen.strokeStyle = css("grid");
  pen.lineWidth = 1;
  const x = (v) => margin + ((v - left) / (right - left)) * (width - margin);
  const y = (v) => height - margin / 2 - ((v - bottom) / (top - bottom)) * (height - margin);
  pen.textAlign = "center";
  for (const v of ticks(left, right, Math.max(2, width / 110))) {
    if (margin) { pen.beginPath(); pen.moveTo(x(v), 0); pen.lineTo(x(v), height); pen.stroke(); }
    if (x(v) > 24 && x(v) < width - 24) pen.fillText(told(v), x(v), height - 4);
  }
  pen.textAlign = "left";
  for (const v of ticks(bottom, top, Math.max(2, height / 70))) {
    if (margin) { pen.beginPath(); pen.moveTo(0, y(v)); pen.lineTo(width, y(v)); pen.stroke(); }
    if (y(v) > 16 && y(v) < height - 18) pen.fillText(told(v), 4, y(v) + 4);
  }
  pen.fillStyle = css("ink");
  pen.fillText(names[1], 4, 12);
  pen.textAlign = "right";
  pen.fillText(names[0], width - 4, height - 18);
  return [x, y];
}

// series: [{ x, y, colour, dashed, name }]; range: of y, else that of the values
export function curves(canvas, series, names, range) {
  const [pen, width, height] = prepared(canvas);
  const all = series.flatMap((s) => s.y.filter(Number.isFinite)), across = series.flatMap((s) => s.x);
  if (!all.length || !width) return;
  let [low, high] = range ?? [Math.min(...all), Math.max(...all)];
  if (!range) { const room = 0.08 * (high - low || Math.abs(high) || 1); low -= room; high += room; }
  const [left, right] = [Math.min(...across), Math.max(...across)];
  const [x, y] = axes(pen, width, height, [left, right > left ? right : left + 1, low, high], names, 34);
  pen.lineWidth = 1.8;
  pen.textAlign = "right";
  series.forEach((s, number) => {
    pen.strokeStyle = pen.fillStyle = s.colour;
    pen.setLineDash(s.dashed ? [5, 4] : []);
    pen.beginPath();
    let first = true;
    s.y.forEach((v, i) => {
      if (!Number.isFinite(v)) return;
      pen[first ? "moveTo" : "lineTo"](x(s.x[i]), y(v));
      first = false;
    });
    pen.stroke();
    if (s.name) pen.fillText(s.name, width - 8, 14 + 15 * number);
  });
}

export function grey(image, values, offset, stride, low, high) {
  for (let i = 0; i < image.data.length / 4; i++) {
    const v = (255 * (values[offset + i * stride] - low)) / (high - low || 1);
    image.data[4 * i] = image.data[4 * i + 1] = image.data[4 * i + 2] = v;
    image.data[4 * i + 3] = 255;
  }
  return image;
}

// Sections of a volume (n, n, n) at ``at`` of the way, side by side.
export function sections(canvas, volume, n, at, [low, high]) {
  canvas.width = 3 * n + 8;
  canvas.height = n;
  const pen = canvas.getContext("2d"), k = Math.min(n - 1, Math.round(at * (n - 1)));
  const index = [(v, u) => k * n * n + v * n + u, (v, u) => v * n * n + k * n + u, (v, u) => v * n * n + u * n + k];
  index.forEach((place, which) => {
    const image = pen.createImageData(n, n), flat = new Float32Array(n * n);
    for (let v = 0; v < n; v++) for (let u = 0; u < n; u++) flat[(n - 1 - v) * n + u] = volume[place(v, u)];
    pen.putImageData(grey(image, flat, 0, 1, low, high), which * (n + 4), 0);
  });
}
