"use strict";

const GENERATIONS = "/v1/images/generations";
const PER_RUN = ["class_label", "sampler", "num_inference_steps", "guidance_scale"];
const SHARED = ["seed", "n", "mode"];
const MOST_FRAMES = { each: 100, together: 1000 };
const RECONNECTIONS = 6;
const POLL_MS = 500;
const HISTORY = 80;
const COLOURS = 8;
const RUN_COLOURS = { "": 0, A: 0, B: 1 };
const PLAY_MS = 3000;

const $ = (id) => document.getElementById(id);
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const whole = (number) => Math.round(number).toLocaleString("en");

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function colour(element, number) {
  element.style.setProperty("--request", number === undefined ? "" : `var(--request-${number})`);
  return element;
}

// --- the service --------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(message, param = null) {
    super(message);
    this.param = param;
  }
}

class Unreachable extends Refusal {
  constructor() {
    super("The service cannot be reached.");
  }
}

async function ask(path, { mayAskForKey = true, ...options } = {}) {
  for (;;) {
    const key = sessionStorage.getItem("api-key");
    const headers = key ? { ...options.headers, Authorization: `Bearer ${key}` } : options.headers;
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      throw error.name === "AbortError" ? error : new Unreachable();
    });
    if (response.ok) return response;
    if (response.status !== 401 || !mayAskForKey) throw await refusal(response);
    if (sessionStorage.getItem("api-key") === key) await askForKey(key !== null);
  }
}

async function refusal(response) {
  const reply = await response.json().catch(() => null);
  const error = reply?.error ?? { message: `The service answered ${response.status}.` };
  return new Refusal(error.message, error.param);
}

let keyAsked = null;

function askForKey(wasWrong) {
  keyAsked ??= new Promise((resolve, reject) => {
    $("key-wrong").hidden = !wasWrong;
    $("ask-key").showModal();
    $("ask-key").addEventListener("close", () => {
      keyAsked = null;
      const key = $("key").value.trim();
      $("key").value = "";
      if ($("ask-key").returnValue !== "enter" || key === "") {
        reject(new Refusal("This service needs an API key: press Draw to enter it."));
        return;
      }
      sessionStorage.setItem("api-key", key);
      resolve();
    }, { once: true });
    $("ask-key").returnValue = "";
  });
  return keyAsked;
}

async function* serverSent(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => {
        const colon = line.indexOf(": ");
        return [line.slice(0, colon), line.slice(colon + 2)];
      }));
      yield { id: fields.id, name: fields.event, data: JSON.parse(fields.data) };
    }
  }
}

// --- pictures -----------------------------------------------------------------------------------

function blobOf(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}

class Picture {
  constructor(index, fileName) {
    this.fileName = fileName;
    this.frames = [];
    this.evaluations = null;
    this.isDone = false;
    this.canvas = make("canvas", { width: model.image_size, height: model.image_size });
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `Picture ${index}`);
    this.caption = make("figcaption", {}, make("span", { textContent: index }));
    this.element = make("figure", { className: "picture waiting" }, this.canvas, this.caption);
    fillWithNoise(this.canvas);
  }

  take(evaluation, evaluations, x_0, x_t) {
    this.evaluations = evaluations;
    this.frames.push({ evaluation, x_0, x_t });
    this.element.classList.remove("waiting");
  }

  complete(png) {
    const evaluations = this.evaluations ?? 1;
    this.take(evaluations, evaluations, png, png);
    this.isDone = true;
    const link = make("a", { textContent: "PNG", download: this.fileName, href: URL.createObjectURL(blobOf(png)) });
    link.setAttribute("aria-label", `Download ${this.fileName}, with its recipe`);
    this.caption.append(link);
  }

  forget() {
    const link = this.caption.querySelector("a");
    if (link) URL.revokeObjectURL(link.href);
  }

  frameAt(share, expected) {
    const last = this.frames.length - 1;
    return this.frames[Math.max(0, Math.min(last, Math.ceil(share * expected) - 1))];
  }

  async show(frame, view) {
    const picture = frame?.[view];
    if (!picture || picture === this.wanted) return;
    this.wanted = picture;
    const bitmap = await createImageBitmap(blobOf(picture));
    if (picture === this.wanted) {
      this.canvas.width = bitmap.width;
      this.canvas.height = bitmap.height;
      this.canvas.getContext("2d").drawImage(bitmap, 0, 0);
    }
    bitmap.close();
  }
}

function fillWithNoise(canvas) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const normal = () => 128 + 64 * Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
  for (let i = 0; i < image.data.length; i += 4) {
    const grey = normal();
    image.data.set([grey, model.channels === 1 ? grey : normal(), model.channels === 1 ? grey : normal(), 255], i);
  }
  context.putImageData(image, 0, 0);
}

// --- a run: one request, its pictures and what is said of it ------------------------------------

class Run {
  constructor(name, settings) {
    this.name = name;
    this.settings = settings;
    this.colour = RUN_COLOURS[name];
    this.state = "waiting";
    this.id = null;
    this.lastEvent = "0";
    this.controller = new AbortController();
    const count = Math.min(Math.max(1, Number(settings.n) || 1), model.max_images);
    const stem = settings.model.replace(/[^\w.-]+/g, "-");
    const suffix = name ? `-${name}` : "";
    this.pictures = Array.from({ length: count }, (_, i) => new Picture(i, `${stem}-seed${settings.seed}${suffix}-${i}.png`));
    this.frames = Math.min(MOST_FRAMES.each, Math.floor(MOST_FRAMES.together / count));
    this.begin = performance.now();
    this.element = this.makeElement();
  }

  makeElement() {
    const dot = make("span", { className: "dot" });
    const settings = make("span", { className: "soft", textContent: describe(this.settings) });
    const title = make("h3", { className: "name" }, dot, this.name, settings);
    this.status = make("p", { className: "soft", textContent: "Waiting for the service" });
    this.bar = make("progress", { max: 1, value: 0 });
    this.bar.setAttribute("aria-label", `Progress ${this.name}`);
    const pictures = make("div", { className: "pictures" }, ...this.pictures.map((picture) => picture.element));
    const article = make("article", { className: "run" }, make("header", {}, title, this.status), this.bar, pictures);
    return colour(article, this.colour);
  }

  get columns() {
    return Math.min(8, Math.ceil(Math.sqrt(this.pictures.length)));
  }

  get isRunning() {
    return this.state === "waiting" || this.state === "drawing";
  }

  get progress() {
    const shares = this.pictures.map((picture) => picture.isDone ? 1 : (picture.frames.at(-1)?.evaluation ?? 0) / (picture.evaluations ?? 1));
    return shares.reduce((sum, share) => sum + share, 0) / shares.length;
  }

  get expected() {
    const evaluations = this.pictures.find((picture) => picture.evaluations)?.evaluations;
    return evaluations ? Math.min(this.frames, evaluations - 1) + 1 : 1;
  }

  async draw() {
    try {
      const headers = { "Content-Type": "application/json" };
      const response = await ask(GENERATIONS, { method: "POST", body: this.body(), headers, signal: this.controller.signal });
      this.id = response.headers.get("X-Generation-Id");
      if (this.state === "stopped") {
        this.giveUp();
        return;
      }
      await this.follow(response);
      this.state = "done";
    } catch (error) {
      if (this.state === "stopped") return;
      this.state = "failed";
      throw error;
    } finally {
      this.seconds = (performance.now() - this.begin) / 1000;
    }
  }

  body() {
    const { seed, ...others } = this.settings;
    const asked = { ...others, stream: true, partial_images: this.frames };
    // a seed has up to 63 bits, a number here 53
    return /^\d+$/.test(seed)
      ? JSON.stringify(asked).replace("{", `{"seed":${BigInt(seed)},`)
      : JSON.stringify({ ...asked, seed });
  }

  async follow(response) {
    for (let attempt = 0; ;) {
      const before = this.lastEvent;
      const wasCut = await this.read(response).then(() => false, (error) => {
        if (error instanceof Refusal || error.name === "AbortError") throw error;
        return true;
      });
      if (this.pictures.every((picture) => picture.isDone)) return;
      attempt = this.lastEvent === before ? attempt + 1 : 1;
      if (!wasCut && attempt > 1) throw new Refusal("The service gave the request up before it was done.");
      if (attempt > RECONNECTIONS) throw new Unreachable();
      response = await this.reconnect(attempt);
    }
  }

  async reconnect(attempt) {
    for (let i = attempt; ; i += 1) {
      this.status.textContent = "The connection was lost: trying again";
      await pause(100 * 2 ** i);
      try {
        const headers = { Accept: "text/event-stream", "Last-Event-ID": this.lastEvent };
        return await ask(`${GENERATIONS}/${this.id}`, { headers, signal: this.controller.signal });
      } catch (error) {
        if (!(error instanceof Unreachable) || i === RECONNECTIONS || this.state === "stopped") throw error;
      }
    }
  }

  async read(response) {
    for await (const { id, name, data } of serverSent(response)) {
      if (this.state === "stopped") return;
      if (name === "error") throw new Refusal(data.error.message, data.error.param);
      this.lastEvent = id;
      this.state = "drawing";
      const picture = this.pictures[data.image_index];
      if (name === "image_generation.completed") picture.complete(data.b64_json);
      else picture.take(data.evaluation, data.evaluations, data.b64_json, data.x_t);
      render();
    }
  }

  stop() {
    if (!this.isRunning) return;
    this.state = "stopped";
    if (this.id) this.giveUp();
  }

  giveUp() {
    this.controller.abort();
    ask(`${GENERATIONS}/${this.id}`, { method: "DELETE", mayAskForKey: false, keepalive: true }).catch(() => {});
  }

  tell() {
    const progress = this.progress;
    this.bar.value = progress;
    const seconds = (performance.now() - this.begin) / 1000;
    const percent = `${Math.floor(progress * 100)} %`;
    const sentences = {
      waiting: () => "Waiting for its turn",
      drawing: () => `${percent}, ${duration(seconds * (1 - progress) / progress)} to go`,
      done: () => `Done in ${duration(this.seconds)}`,
      stopped: () => `Stopped at ${percent}`,
      failed: () => progress ? `Failed at ${percent}` : "Not drawn",
    };
    this.status.textContent = sentences[this.state]();
    this.element.classList.toggle("refused", this.state === "failed" && progress === 0);
  }
}

function duration(seconds) {
  if (!Number.isFinite(seconds)) return "some time";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

function describe(settings) {
  const label = settings.class_label;
  const words = [
    label === undefined ? null : model.class_names[label],
    settings.sampler,
    `${settings.num_inference_steps} steps`,
    settings.guidance_scale ? `guidance ${settings.guidance_scale}` : null,
  ];
  return words.filter((word) => word !== null).join(" · ");
}

// --- what is shown: the runs at a step ----------------------------------------------------------

let model = null;
let version = null;  // what is asked for: the served one, or that of the link
let runs = [];
let position = null;  // null follows what is being drawn
let isScheduled = false;
let playing = null;

const isDrawing = () => runs.some((run) => run.isRunning);
const view = () => document.querySelector("[name=view]:checked").value;

function render() {
  if (isScheduled) return;
  isScheduled = true;
  requestAnimationFrame(() => {
    isScheduled = false;
    renderNow();
  });
}

function renderNow() {
  const steps = Math.max(1, ...runs.map((run) => run.expected));
  const newest = Math.max(1, ...runs.flatMap((run) => run.pictures.map((picture) => Math.ceil(steps * picture.frames.length / run.expected))));
  const at = position ?? steps;
  const hasFrames = runs.some((run) => run.pictures.some((picture) => picture.frames.length));
  $("scrub").max = steps;
  $("scrub").value = Math.min(at, newest);
  $("scrub").disabled = $("play").disabled = !hasFrames;
  for (const run of runs) {
    for (const picture of run.pictures) picture.show(picture.frameAt(at / steps, run.expected), view());
    run.tell();
  }
  $("shown").textContent = hasFrames ? whereabouts(at / steps) : "";
  $("scrub").setAttribute("aria-valuetext", $("shown").textContent);
  $("stop").disabled = !isDrawing();
}

function offerSeed() {
  $("keep-seed").hidden = control("seed").value.trim() === $("drawn-seed").textContent;
}

function whereabouts(share) {
  const each = runs.map((run) => {
    const picture = run.pictures.find((one) => one.frames.length);
    return picture && `${run.name} ${picture.frameAt(share, run.expected).evaluation} of ${picture.evaluations}`.trim();
  });
  return each.filter(Boolean).join(", ");
}

function scrubTo(step) {
  const steps = Number($("scrub").max);
  const to = Math.max(1, Math.min(steps, step));
  position = to === steps ? null : to;
  renderNow();
}

function scrub(step) {
  stopPlaying();
  scrubTo(step);
}

function play() {
  if (playing !== null) {
    stopPlaying();
    return;
  }
  const steps = Number($("scrub").max);
  const from = Number($("scrub").value) >= steps ? 1 : Number($("scrub").value);
  const begin = performance.now();
  const advance = (now) => {
    const step = Math.floor(from + Math.max(0, now - begin) / PLAY_MS * steps);
    scrubTo(step);
    if (step >= steps) stopPlaying();
    else playing = requestAnimationFrame(advance);
  };
  playing = requestAnimationFrame(advance);
  $("play").textContent = "❚❚";
  $("play").setAttribute("aria-label", "Pause");
}

function stopPlaying() {
  if (playing !== null) cancelAnimationFrame(playing);
  playing = null;
  $("play").textContent = "▶";
  $("play").setAttribute("aria-label", "Play the steps");
}

let lastSaid = 0;

function say(sentence, isNews = true) {
  if (!isNews && performance.now() - lastSaid < 5000) return;
  lastSaid = performance.now();
  $("live").textContent = sentence;
}

function tellProgress() {
  if (!isDrawing()) return;
  for (const run of runs) if (run.isRunning) run.tell();
  say(runs.map((run) => `${run.name} ${run.status.textContent}`).join(". "), false);
}

// --- settings -----------------------------------------------------------------------------------

const field = (param, name) =>
  (SHARED.includes(param) ? $("form") : $(`settings-${name}`)).querySelector(`[data-param=${param}]`);
const control = (param, name) => field(param, name).querySelector("select, input:not([type=range])");

function makeSettings(name) {
  const fieldset = $("settings").content.firstElementChild.cloneNode(true);
  fieldset.id = `settings-${name}`;
  fieldset.querySelector(".name :last-child").textContent = name;
  colour(fieldset, RUN_COLOURS[name]);
  for (const box of fieldset.querySelectorAll(".field")) {
    const input = box.querySelector("select, input:not([type=range])");
    input.id = `${box.dataset.param}-${name}`;
    box.querySelector("label").htmlFor = input.id;
  }
  $("both").append(fieldset);
  const option = (value, text) => make("option", { value, textContent: text });
  if (!model.needs_label) control("class_label", name).append(option("", "any"));
  control("class_label", name).append(...model.class_names.map((text, i) => option(i, text)));
  control("sampler", name).append(...model.samplers.map((sampler) => option(sampler, sampler)));
  field("class_label", name).hidden = model.class_names.length === 0;
  field("guidance_scale", name).hidden = !model.guidance;
  control("num_inference_steps", name).value = model.default_steps;
  control("guidance_scale", name).value = 0;
  control("sampler", name).value = "ddim";
  control("class_label", name).addEventListener("change", () => admitGuidance(name));
  slide("num_inference_steps", name, (share) => Math.round(model.max_steps ** (share / 1000)), (steps) => 1000 * Math.log(steps) / Math.log(model.max_steps));
  slide("guidance_scale", name, Number, Number);
  admitGuidance(name);
}

function slide(param, name, valueOf, shareOf) {
  const [slider, input] = field(param, name).querySelectorAll("input");
  const follow = () => { slider.value = shareOf(Number(input.value)); };
  slider.addEventListener("input", () => { input.value = valueOf(Number(slider.value)); });
  input.addEventListener("input", follow);
  follow();
}

function admitGuidance(name) {
  const hasClass = control("class_label", name).value !== "";
  const box = field("guidance_scale", name);
  for (const input of box.querySelectorAll("input")) input.disabled = !hasClass;
  box.querySelector(".hint").hidden = hasClass;
}

function setCompare(isOn) {
  $("compare").checked = isOn;
  $("settings-B").hidden = !isOn;
  $("settings-A").querySelector(".name :last-child").textContent = isOn ? "A" : "Settings";
  $("settings-A").querySelector(".dot").hidden = !isOn;
}

function copySettings(from, to) {
  for (const param of PER_RUN) setValue(param, to, control(param, from).value);
  const another = control("sampler", from).value === "ancestral" ? "ddim" : "ancestral";
  if (model.samplers.includes(another)) setValue("sampler", to, another);
}

function setValue(param, name, value) {
  const input = control(param, name);
  input.value = value;
  input.dispatchEvent(new Event("input"));
  input.dispatchEvent(new Event("change"));
}

const numberOr = (text) => text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : text;

function settingsOf(name, seed) {
  const settings = {
    model: version,
    seed,
    n: numberOr(control("n").value),
    mode: control("mode").value,
    sampler: control("sampler", name).value,
    num_inference_steps: numberOr(control("num_inference_steps", name).value),
  };
  const label = control("class_label", name).value;
  if (label !== "") settings.class_label = Number(label);
  const guidance = numberOr(control("guidance_scale", name).value);
  if (label !== "" && model.guidance && guidance !== 0) settings.guidance_scale = guidance;
  return settings;
}

const randomSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);

// --- the link: all settings, in the part of the address after # -----------------------------------

function linkOf(chosen) {
  const link = new URLSearchParams();
  for (const { name, settings } of chosen) {
    for (const [param, value] of Object.entries(settings)) {
      if (name !== "B") link.set(param, value);
      else if (PER_RUN.includes(param)) link.set(`b.${param}`, value);
    }
  }
  return `${location.pathname}#${link}`;
}

function openLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  if (!link.has("seed")) return false;
  setVersion(link.get("model") ?? model.id);
  const isCompared = [...link.keys()].some((key) => key.startsWith("b."));
  for (const param of SHARED) if (link.has(param)) control(param).value = link.get(param);
  for (const [name, prefix] of [["A", ""], ["B", "b."]]) {
    for (const param of PER_RUN) {
      const standard = { class_label: "", guidance_scale: "0" }[param];
      const value = link.get(prefix + param) ?? standard;
      if (value !== undefined) setValue(param, name, value);
    }
  }
  setCompare(isCompared);
  return true;
}

// --- drawing ------------------------------------------------------------------------------------

async function draw() {
  if (model === null) {
    await open();
    return;
  }
  stopAll();
  stopPlaying();
  clearErrors();
  for (const run of runs) for (const picture of run.pictures) picture.forget();
  const seed = control("seed").value.trim() || randomSeed();
  const names = $("compare").checked ? ["A", "B"] : [""];
  const started = names.map((name) => new Run(name, settingsOf(name || "A", seed)));
  runs = started;
  position = null;
  layOut(runs.map((run) => run.element), runs[0].columns);
  $("facts").hidden = false;
  $("drawn-seed").textContent = seed;
  offerSeed();
  history.replaceState(null, "", linkOf(runs));
  renderNow();
  $("stage").scrollIntoView({ block: "nearest", behavior: "smooth" });
  say("Drawing");
  const results = await Promise.allSettled(runs.map((run) => run.draw().finally(render)));
  if (runs !== started) return;
  renderNow();
  results.forEach(({ reason }, i) => reason && showError(reason, runs[i]));
  say(runs.map((run) => `${run.name} ${run.status.textContent}`).join(". "));
}

function layOut(elements, columns) {
  $("runs").replaceChildren(...elements);
  $("player").classList.toggle("alone", elements.length === 1);
  $("player").style.setProperty("--columns", columns);
}

function stopAll() {
  for (const run of runs) run.stop();
  render();
}

function showError(error, run) {
  const message = error instanceof Refusal ? error.message : "Something went wrong in this page: the browser's console says what.";
  if (!(error instanceof Refusal)) console.error(error);
  if ([...PER_RUN, ...SHARED].includes(error.param)) {
    const box = field(error.param, run?.name || "A");
    if (!box.hidden && !box.querySelector(".wrong")) {
      const input = box.querySelector("select, input:not([type=range])");
      const note = make("p", { className: "wrong", id: `${input.id}-wrong`, textContent: message });
      note.setAttribute("role", "alert");
      input.setAttribute("aria-invalid", "true");
      input.setAttribute("aria-describedby", note.id);
      box.append(note);
      input.focus();
    }
    if (!box.hidden) return;
  }
  $("wrong").textContent = message;
  $("wrong").hidden = false;
}

function clearErrors() {
  $("wrong").hidden = true;
  for (const note of document.querySelectorAll(".field .wrong")) if (note.id !== "key-wrong") note.remove();
  for (const input of document.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
}

async function copy(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
  } catch {
    button.textContent = copyOldWay(text) ? "copied" : "cannot copy here";
  }
  await pause(1200);
  button.textContent = before;
}

// without https a browser has no navigator.clipboard
function copyOldWay(text) {
  const area = make("textarea", { value: text, className: "unseen" });
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  return isCopied;
}

// --- the engine ---------------------------------------------------------------------------------

const others = new Map();
const places = new Map();
const lines = { throughput: [], fill: [], rows: [] };
let before = new Map();

async function watchEngine() {
  for (;;) {
    if (!document.hidden) await lookAtEngine();
    tellProgress();
    await pause(POLL_MS);
  }
}

async function lookAtEngine() {
  try {
    const response = await ask("/v1/engine", { mayAskForKey: false });
    showEngine(await response.json());
    $("engine-wrong").hidden = true;
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    $("engine-wrong").textContent = error.message;
    $("engine-wrong").hidden = false;
  }
}

function showEngine({ rows, requests, replicas = [] }) {
  colourOthers(requests);
  const { throughput, fill } = measure(replicas);
  if (throughput !== null) {
    $("throughput").textContent = whole(throughput);
    $("fill").textContent = fill === null ? "–" : `${Math.round(fill * 100)} %`;
    remember({ throughput, fill: fill ?? 0, rows });
  }
  $("rows").textContent = whole(rows);
  const none = make("li", { className: "soft", textContent: "Nothing in hand" });
  $("requests").replaceChildren(...requests.length ? requests.map(requestItem) : [none]);
  $("replicas").replaceChildren(...replicas.flatMap((replica, i) => shownEngines(replica).map((engine) => engineElement(engine, replica, i))));
}

function colourOthers(requests) {
  const there = new Set(requests.map(({ id }) => id));
  for (const id of others.keys()) if (!there.has(id)) others.delete(id);
  for (const { id } of requests) {
    if (ownRun(id) || others.has(id)) continue;
    const taken = new Set(others.values());
    const free = Array.from({ length: COLOURS - 2 }, (_, i) => i + 2).find((number) => !taken.has(number));
    others.set(id, free ?? 2 + others.size % (COLOURS - 2));
  }
}

const ownRun = (id) => runs.find((run) => run.id !== null && run.id === id);
const colourOf = (id) => ownRun(id)?.colour ?? others.get(id);

function requestItem({ id, n, done, rows }) {
  const own = ownRun(id);
  const name = own ? `${own.name} yours`.trim() : id.replace(/^gen_/, "").slice(0, 6);
  const count = n === undefined ? `${whole(rows)} rows to go` : `${done ?? 0} of ${n}`;
  const dot = make("span", { className: "dot" });
  return colour(make("li", {}, dot, make("span", { textContent: name }), make("small", { textContent: count })), colourOf(id));
}

function shownEngines({ engines }) {
  const busy = engines.filter((engine) => engine.images.length);
  return busy.length ? busy : engines.filter((engine) => engine.mode === model.mode).slice(-1);
}

function measure(replicas) {
  let useful = 0, room = 0, throughput = 0, isNew = false;
  const now = new Map();
  for (const { replica, at, engines } of replicas) {
    for (const { model: name, mode, calls, useful_rows, rows_of_call } of engines) {
      const key = `${replica} ${name} ${mode}`;
      const last = before.get(key);
      now.set(key, { at, calls, useful_rows });
      if (!last || last.at === at || calls < last.calls) continue;
      isNew = true;
      useful += useful_rows - last.useful_rows;
      room += (calls - last.calls) * rows_of_call;
      throughput += (useful_rows - last.useful_rows) / (at - last.at);
    }
  }
  before = now;
  return { throughput: isNew ? throughput : null, fill: room ? useful / room : null };
}

function remember(values) {
  for (const [name, value] of Object.entries(values)) {
    const line = lines[name];
    line.push(value);
    if (line.length > HISTORY) line.shift();
    const top = name === "fill" ? 1 : Math.max(1, ...line);
    const from = HISTORY - line.length;
    $(`${name}-line`).setAttribute("points", line.map((y, i) => `${from + i},${(19 - 18 * y / top).toFixed(2)}`).join(" "));
  }
}

function engineElement(engine, { replica }, i) {
  const key = `${replica} ${engine.model} ${engine.mode}`;
  const slots = placed(key, engine).map(slotElement);
  const waiting = (engine.num_images ?? engine.images.length) - engine.images.filter((image) => image.in_call).length;
  const busy = slots.filter((slot) => slot.classList.contains("taken")).length;
  const facts = [`${engine.model} ${engine.mode}`, `${busy} of ${engine.rows_of_call} rows`];
  if (waiting) facts.push(`${waiting} ${waiting === 1 ? "image waits" : "images wait"} for a turn`);
  const title = make("h3", {}, `Replica ${i + 1} `, make("small", { textContent: facts.join(" · ") }));
  const row = make("div", { className: "slots" }, ...slots);
  row.setAttribute("role", "img");
  row.setAttribute("aria-label", `${busy} of ${engine.rows_of_call} rows of a network call are taken`);
  return make("div", { className: "replica" }, title, row);
}

// an image keeps its boxes from one look to the next
function placed(key, { rows_of_call, images }) {
  const rows = new Map(images.filter((image) => image.in_call).flatMap((image) =>
    Array.from({ length: image.rows }, (_, i) => [`${image.request} ${image.image_index} ${i}`, image])));
  const slots = (places.get(key) ?? []).map((row) => rows.has(row) ? row : null).slice(0, rows_of_call);
  while (slots.length < rows_of_call) slots.push(null);
  const there = new Set(slots);
  for (const row of rows.keys()) {
    const free = slots.indexOf(null);
    if (!there.has(row) && free >= 0) slots[free] = row;
  }
  places.set(key, slots);
  return slots.map((row) => row === null ? null : rows.get(row));
}

function slotElement(image) {
  const slot = make("div", { className: "slot" });
  if (image === null) return slot;
  slot.classList.add("taken");
  slot.dataset.request = image.request ?? "";
  slot.style.setProperty("--done", image.evaluation / image.evaluations);
  slot.append(make("span", { textContent: whole(image.t).replace(",", "") }));
  return colour(slot, colourOf(image.request));
}

// --- from here on ---------------------------------------------------------------------------------

// until the model is known there is nothing to choose from; if it cannot be had, Draw asks again
async function open() {
  $("draw").disabled = true;
  try {
    const response = await ask("/v1/models");
    model = (await response.json()).data[0];
  } finally {
    $("draw").disabled = false;
  }
  setVersion(model.id);
  for (const name of ["A", "B"]) makeSettings(name);
  control("n").max = model.max_images;
  control("n").value = Math.min(4, model.max_images);
  control("mode").value = model.mode;
  setCompare(false);
  $("choices").disabled = false;
  showEmpty();
  watchEngine();
  if (openLink()) await draw();
}

function setVersion(id) {
  version = id;
  document.title = `${id} · ray-ddpm`;
  $("model").textContent = id;
  const size = `${model.image_size} × ${model.image_size} ${model.channels === 1 ? "grey" : "colour"} pixels`;
  const classes = model.class_names.length ? [`${model.class_names.length} classes`] : [];
  const facts = [size, ...classes, `${whole(model.timesteps)} timesteps`].join(" · ");
  $("about-model").textContent = id === model.id ? facts : `the version of this link; the service has ${model.id} now`;
}

function showEmpty() {
  const canvas = make("canvas", { width: model.image_size, height: model.image_size });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Noise");
  fillWithNoise(canvas);
  const words = make("p", { className: "soft", textContent: "Noise. Draw, and watch it become an image." });
  const pictures = make("div", { className: "pictures" }, make("figure", { className: "picture" }, canvas));
  layOut([make("div", { className: "run" }, words, make("span"), pictures)], 1);
}

function start(action) {
  action().catch((error) => showError(error));
}

function onKey(event) {
  if ($("ask-key").open || event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target;
  const isTyping = target.matches("input:not([type=range], [type=checkbox], [type=radio]), select");
  const usesArrows = target.matches("input:not([type=checkbox]), select");
  const usesSpace = target.matches("input, select, button, a");
  const step = Number($("scrub").value);
  const leap = event.shiftKey ? 10 : 1;
  const actions = {
    Enter: () => !target.matches("button, a") && !$("draw").disabled && $("form").requestSubmit($("draw")),
    Escape: () => {
      stopAll();
      target.blur();
    },
    ArrowLeft: () => !usesArrows && scrub(step - leap),
    ArrowRight: () => !usesArrows && scrub(step + leap),
    Home: () => !usesArrows && scrub(1),
    End: () => !usesArrows && scrub(Infinity),
    " ": () => !usesSpace && !$("play").disabled && play(),
    x: () => !isTyping && switchView(),
  };
  if (event.key in actions && actions[event.key]() !== false) event.preventDefault();
}

function switchView() {
  document.querySelector("[name=view]:not(:checked)").checked = true;
  render();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  start(draw);
});
$("stop").addEventListener("click", stopAll);
$("compare").addEventListener("change", () => {
  if ($("compare").checked) copySettings("A", "B");
  setCompare($("compare").checked);
});
$("scrub").addEventListener("input", () => scrub(Number($("scrub").value)));
$("play").addEventListener("click", play);
for (const radio of document.querySelectorAll("[name=view]")) radio.addEventListener("change", render);
$("seed").addEventListener("input", offerSeed);
$("keep-seed").addEventListener("click", () => {
  control("seed").value = $("drawn-seed").textContent;
  offerSeed();
});
$("copy-seed").addEventListener("click", () => copy($("drawn-seed").textContent, $("copy-seed")));
$("copy-link").addEventListener("click", () => copy(location.href, $("copy-link")));
document.addEventListener("keydown", onKey);
addEventListener("hashchange", () => model !== null && openLink() && start(draw));
addEventListener("pagehide", stopAll);
start(open);
