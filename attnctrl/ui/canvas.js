// Draws regions over a picture and ties each to words of the prompt. The value is JSON text, a list of
// {phrase, box: [x0, y0, x1, y1]} or {phrase, polygon: [[x, y], ...]} in fractions of the picture.
const COLOURS = ["#e6007a", "#0077ff", "#00a36c", "#d97000", "#7a00e6", "#008fa8"];
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
const words = element.querySelector(".words"), list = element.querySelector(".regions");
const tools = [...element.querySelectorAll("[data-tool]")];
const clicked = new WeakMap();  // of a region, its first and last word: "a" stands more than once
let regions = [], selected = -1, tool = "box", drag = null, backdrop = null;

const clamp = (v) => Math.min(1, Math.max(0, v));
const round = (v) => Math.round(clamp(v) * 1000) / 1000;
const colour = (i) => COLOURS[i % COLOURS.length];

function emit() {
  props.value = JSON.stringify(regions);
  trigger("change");
}

function trace(region) {
  pen.beginPath();
  const points = region.box
    ? [[0, 1], [2, 1], [2, 3], [0, 3]].map(([x, y]) => [region.box[x], region.box[y]])
    : region.polygon;
  points.forEach(([x, y], i) => pen[i ? "lineTo" : "moveTo"](x * canvas.width, y * canvas.height));
  pen.closePath();
  return points;
}

function paint() {
  const [width, height] = props.shape || [1, 1];
  canvas.width = 640;
  canvas.height = Math.round((640 * height) / width);
  if (backdrop && backdrop.complete && backdrop.naturalWidth) pen.drawImage(backdrop, 0, 0, canvas.width, canvas.height);
  const shown = drag && drag.region ? [...regions, drag.region] : regions;
  shown.forEach((region, i) => {
    const points = trace(region);
    pen.fillStyle = colour(i) + (i === selected ? "55" : "2b");
    pen.fill();
    pen.lineWidth = i === selected ? 5 : 3;
    pen.strokeStyle = colour(i);
    pen.stroke();
    const left = Math.min(...points.map((p) => p[0])) * canvas.width;
    const top = Math.min(...points.map((p) => p[1])) * canvas.height;
    const label = region.phrase || "region " + (i + 1);
    pen.font = "bold 20px sans-serif";
    pen.fillStyle = colour(i);
    pen.fillRect(left, top, pen.measureText(label).width + 12, 27);
    pen.fillStyle = "white";
    pen.fillText(label, left + 6, top + 20);
  });
  if (!shown.length) {
    pen.fillStyle = "#71717a";
    pen.font = "20px sans-serif";
    pen.textAlign = "center";
    pen.fillText(props.hint || "drag to draw a region", canvas.width / 2, canvas.height / 2);
    pen.textAlign = "start";
  }
}

function span(region) {
  // The words of the prompt that are the region's phrase, as [first, last] of the buttons.
  const text = (props.prompt || "").toLowerCase(), spans = props.words || [];
  const phrase = region ? region.phrase.toLowerCase() : "";
  const is = (a, b) => b < spans.length && text.slice(spans[a][0], spans[b][1]) === phrase;
  const last = region && clicked.get(region);
  if (!phrase || (last && is(...last))) return phrase ? last : null;
  for (let a = 0; a < spans.length; a++) for (let b = a; b < spans.length; b++) if (is(a, b)) return [a, b];
  return null;
}

function tie(i) {
  if (selected < 0) return;
  const region = regions[selected], now = span(region);
  const inside = now && i >= now[0] && i <= now[1];
  const [a, b] = !now || inside ? [i, i] : [Math.min(i, now[0]), Math.max(i, now[1])];
  clicked.set(region, [a, b]);
  region.phrase = props.prompt.slice(props.words[a][0], props.words[b][1]);
  render();
  emit();
}

function chips() {
  const now = span(regions[selected]);
  const hint = document.createElement("span");
  hint.className = "hint";
  hint.textContent = selected < 0 ? "Words of the prompt:" : "Region " + (selected + 1) + " holds (click first and last word):";
  words.replaceChildren(hint, ...(props.words || []).map(([a, b], i) => {
    const button = document.createElement("button"), on = now && i >= now[0] && i <= now[1];
    button.type = "button";
    button.textContent = props.prompt.slice(a, b);
    button.setAttribute("aria-pressed", String(Boolean(on)));
    if (on) button.style.background = colour(selected);
    button.onclick = () => tie(i);
    return button;
  }));
}

function field(kind, value, label, changed) {
  const input = document.createElement("input");
  input.className = kind;
  input.value = value;
  input.setAttribute("aria-label", label);
  input.onchange = () => { changed(input.value); render(); emit(); };
  if (kind === "side") Object.assign(input, { type: "number", min: 0, max: 1, step: 0.01 });
  return input;
}

function row(region, i) {
  const item = document.createElement("li"), dot = document.createElement("button"), gone = document.createElement("button");
  item.className = i === selected ? "selected" : "";
  Object.assign(dot, { type: "button", className: "dot", textContent: String(i + 1) });
  dot.style.background = colour(i);
  dot.setAttribute("aria-label", "Select region " + (i + 1));
  dot.onclick = () => { selected = i; render(); };
  Object.assign(gone, { type: "button", textContent: "×" });
  gone.setAttribute("aria-label", "Remove region " + (i + 1));
  gone.onclick = () => { remove(i); };
  const phrase = field("phrase", region.phrase, "Phrase of region " + (i + 1), (text) => { region.phrase = text.trim(); });
  phrase.placeholder = "words of the prompt";
  phrase.onfocus = () => { if (selected !== i) { selected = i; chips(); paint(); } };
  const sides = (region.box || []).map((value, side) =>
    field("side", value, ["left", "top", "right", "bottom"][side] + " of region " + (i + 1), (text) => {
      if (text !== "" && isFinite(text)) region.box[side] = Number(text);
    }));
  const kind = document.createElement("span");
  kind.className = "kind";
  kind.textContent = region.polygon ? "outline" : "";
  item.append(dot, phrase, ...sides, kind, gone);
  return item;
}

function render() {
  if (selected >= regions.length) selected = regions.length - 1;
  list.replaceChildren(...regions.map(row));
  chips();
  paint();
}

function remove(i) {
  regions.splice(i, 1);
  selected = Math.min(selected, regions.length - 1);
  render();
  emit();
}

function add(region) {
  regions.push(region);
  selected = regions.length - 1;
  render();
  emit();
}

function move(region, dx, dy) {
  if (!region.box) region.polygon = region.polygon.map(([x, y]) => [round(x + dx), round(y + dy)]);
  else {
    const [x0, y0, x1, y1] = region.box;
    if (x0 + dx >= 0 && x1 + dx <= 1) [region.box[0], region.box[2]] = [round(x0 + dx), round(x1 + dx)];
    if (y0 + dy >= 0 && y1 + dy <= 1) [region.box[1], region.box[3]] = [round(y0 + dy), round(y1 + dy)];
  }
}

function place(event) {
  const frame = canvas.getBoundingClientRect();
  return [round((event.clientX - frame.left) / frame.width), round((event.clientY - frame.top) / frame.height)];
}

function at([x, y]) {
  // The last region that holds the point, so that what lies on top is found first.
  for (let i = regions.length - 1; i >= 0; i--) {
    trace(regions[i]);
    if (pen.isPointInPath(x * canvas.width, y * canvas.height)) return i;
  }
  return -1;
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  drag = { from: place(event), points: [place(event)], region: null };
});
canvas.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const [x, y] = place(event), [x0, y0] = drag.from;
  if (tool === "outline") {
    const [px, py] = drag.points[drag.points.length - 1];
    if (Math.hypot(x - px, y - py) > 0.012 && drag.points.length < 400) drag.points.push([x, y]);
    if (drag.points.length > 2) drag.region = { phrase: "", polygon: drag.points };
  } else if (Math.abs(x - x0) > 0.02 && Math.abs(y - y0) > 0.02)
    drag.region = { phrase: "", box: [Math.min(x, x0), Math.min(y, y0), Math.max(x, x0), Math.max(y, y0)] };
  paint();
});
canvas.addEventListener("pointerup", () => {
  const done = drag;
  drag = null;
  if (!done) return;
  if (done.region) return add(done.region);
  selected = at(done.from);
  render();
});
canvas.addEventListener("pointercancel", () => { drag = null; paint(); });
canvas.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-0.01, 0], ArrowRight: [0.01, 0], ArrowUp: [0, -0.01], ArrowDown: [0, 0.01] }[event.key];
  if (selected < 0) return;
  if (event.key === "Delete" || event.key === "Backspace") remove(selected);
  else if (step) { move(regions[selected], ...step); render(); emit(); } else return;
  event.preventDefault();
});
tools.forEach((button) => button.addEventListener("click", () => {
  tool = button.dataset.tool;
  tools.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
}));
element.querySelector("[data-act=add]").addEventListener("click", () => add({ phrase: "", box: [0.25, 0.25, 0.75, 0.75] }));
element.querySelector("[data-act=clear]").addEventListener("click", () => { regions = []; selected = -1; render(); emit(); });

function receive() {
  let given = [];
  try { given = JSON.parse(props.value || "[]"); } catch (error) { console.warn("regions are no JSON", error); }
  if (JSON.stringify(given) === JSON.stringify(regions)) return;
  regions = given;
  selected = regions.length ? 0 : -1;
  render();
}

function redraw() {
  backdrop = null;
  if (props.picture) {
    backdrop = new Image();
    backdrop.onload = paint;
    backdrop.src = props.picture;
  }
  paint();
}

watch("value", receive);
watch(["words", "prompt"], chips);
watch(["picture", "shape"], redraw);
receive();
chips();
redraw();
