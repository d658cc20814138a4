// The page of a user study: shows a rater's pairs in the order of the manifest, keeps the answers in this browser, and
// saves them as a file. It knows images by their blinded names alone.
"use strict";

const $ = (id) => document.getElementById(id);
const HASH = $("manifest").dataset.hash;
const MANIFEST = JSON.parse($("manifest").textContent);
const SIDES = ["left", "tie", "right"];
const LABELS = { left: "Left", tie: "No difference", right: "Right" };

let rater = null; // name
let items = []; // [token, prompt, left image, right image] by their places in the manifest
let state = null; // what is kept: {started, position, answers: {token: {answers, ms, at, done}}}
let active = 0; // the question that the arrow keys answer
let ready = false; // both images are there
let since = 0; // when the running watch was started, 0 while it stands
let zoom = { scale: 1, x: 0, y: 0 }; // x and y as shares of an image's width and height
let kept = true; // whether this browser keeps answers

const storageKey = (name) => `study:${HASH}:${name}`;

function stored(name) {
  try {
    return JSON.parse(localStorage.getItem(storageKey(name)));
  } catch {
    return null;
  }
}

function keep() {
  try {
    localStorage.setItem(storageKey(rater), JSON.stringify(state));
    localStorage.setItem(storageKey(""), JSON.stringify(rater));
  } catch {
    kept = false;
  }
}

const doneCount = (of) => Object.values(of.answers).filter((answer) => answer.done).length;

function show(screen) {
  for (const id of ["start", "compare", "end"]) $(id).hidden = id !== screen;
  window.scrollTo(0, 0);
}

function showStart() {
  for (const question of MANIFEST.questions) {
    const line = document.createElement("li");
    line.innerHTML = `<b></b> <span class="faint"></span>`;
    line.firstChild.textContent = question.title;
    line.lastChild.textContent = question.text;
    $("asked").append(line);
  }
  for (const name of Object.keys(MANIFEST.raters)) $("rater").append(new Option(name, name));
  const last = stored("");
  if (last in MANIFEST.raters) $("rater").value = last;
  const limit = MANIFEST.too_fast_ms / 1000;
  $("limit").textContent = limit ? `answers to a pair in less than ${limit} s are marked as too fast.` : "";
  showSaved();
  show("start");
}

function showSaved() {
  const name = $("rater").value;
  const saved = stored(name);
  const total = MANIFEST.raters[name].length;
  const done = saved ? doneCount(saved) : 0;
  $("saved").textContent = done ? `${done} of ${total} pairs are answered in this browser.` : `${total} pairs`;
  $("begin").textContent = done ? "Go on" : "Begin";
  $("export-early").hidden = !done;
}

function choose(name) {
  rater = name;
  items = MANIFEST.raters[rater];
  state = stored(rater) || { started: new Date().toISOString(), position: 0, answers: {} };
}

function begin() {
  choose($("rater").value);
  keep();
  showPair();
}

const token = () => items[state.position][0];
const showing = (wanted) => state.position < items.length && wanted === token();
const record = () => (state.answers[token()] ||= { answers: {}, ms: 0, at: null, done: false });
const whole = () => MANIFEST.questions.every((question) => question.id in record().answers);

function showPair() {
  if (state.position >= items.length) return showEnd();
  const [, prompt, left, right] = items[state.position];
  show("compare");
  ready = false;
  $("images").classList.remove("loaded");
  setZoom({ scale: 1, x: 0, y: 0 });
  $("prompt").textContent = MANIFEST.prompts[prompt];
  active = Math.max(0, MANIFEST.questions.findIndex((question) => !(question.id in record().answers)));
  showProgress();
  showAnswers();
  notice("Loading both images");
  load(token(), left, right);
}

async function load(wanted, left, right) {
  const images = [$("left"), $("right")];
  images[0].src = MANIFEST.images[left];
  images[1].src = MANIFEST.images[right];
  try {
    await Promise.all(images.map((image) => image.decode()));
  } catch {
    if (showing(wanted)) notice("An image could not be loaded: please tell whoever asked you, and reload the page");
    return;
  }
  if (!showing(wanted)) return; // the rater has gone on
  $("compare").style.setProperty("--aspect", images[0].naturalWidth / images[0].naturalHeight);
  $("images").classList.add("loaded");
  ready = true;
  notice(kept ? "" : "This browser does not keep answers: save them before you close the page");
  startWatch();
  showAnswers();
  preload();
}

function preload() {
  const following = items[state.position + 1];
  if (following) for (const place of following.slice(2)) new Image().src = MANIFEST.images[place];
}

const notice = (text) => ($("notice").textContent = text);
const startWatch = () => (since = performance.now());

function stopWatch() {
  if (since) record().ms += Math.round(performance.now() - since);
  since = 0;
}

function showProgress() {
  const done = doneCount(state);
  $("bar").value = done / items.length;
  $("count").textContent = `pair ${state.position + 1} of ${items.length}`;
  const times = items.map(([name]) => state.answers[name]).filter((answer) => answer && answer.done);
  const sorted = times.map((answer) => answer.ms).sort((a, b) => a - b);
  const minutes = ((items.length - done) * sorted[sorted.length >> 1]) / 60000;
  const left = minutes < 1 ? "less than a minute" : `about ${Math.round(minutes)} min`;
  $("eta").textContent = sorted.length < 3 || done === items.length ? "" : `${left} to go`;
}

function makeQuestions() {
  MANIFEST.questions.forEach((question, number) => {
    const row = document.createElement("div");
    row.className = "question";
    row.innerHTML = `<p><b></b><small></small></p><div class="choices" role="group"></div>`;
    row.querySelector("b").textContent = question.title;
    row.querySelector("small").textContent = question.text;
    row.lastChild.setAttribute("aria-label", question.title);
    for (const side of SIDES) {
      const button = document.createElement("button");
      button.textContent = LABELS[side];
      button.onclick = () => {
        active = number;
        answer(side);
        button.blur();
      };
      row.lastChild.append(button);
    }
    $("questions").append(row);
  });
}

function showAnswers() {
  const answers = record().answers;
  [...$("questions").children].forEach((row, number) => {
    row.classList.toggle("active", number === active);
    [...row.lastChild.children].forEach((button, place) => {
      button.disabled = !ready;
      button.setAttribute("aria-pressed", answers[MANIFEST.questions[number].id] === SIDES[place]);
    });
  });
  $("next").disabled = !ready || !whole();
  $("back").disabled = state.position === 0;
}

function answer(side) {
  if (!ready) return;
  record().answers[MANIFEST.questions[active].id] = side;
  const open = MANIFEST.questions.findIndex((question) => !(question.id in record().answers));
  if (open >= 0) active = open;
  keep();
  showAnswers();
}

function next() {
  if (!ready || !whole()) return;
  stopWatch();
  record().done = true;
  record().at = new Date().toISOString();
  move(1);
}

function back() {
  if (state.position > 0) {
    if (state.position < items.length) stopWatch();
    move(-1);
  }
}

function move(by) {
  since = 0;
  state.position += by;
  keep();
  showPair();
}

function showEnd() {
  $("total").textContent = `You have answered ${doneCount(state)} of ${items.length} pairs.`;
  show("end");
}

function exported() {
  const answers = items.map(([name]) => ({ id: name, ...state.answers[name] })).filter((answer) => answer.done);
  for (const answer of answers) {
    delete answer.done;
    answer.too_fast = answer.ms < MANIFEST.too_fast_ms;
  }
  return {
    format: "strop-study-answers/1",
    manifest: HASH,
    rater: rater,
    started: state.started,
    exported: new Date().toISOString(),
    complete: answers.length === items.length,
    answers: answers,
  };
}

function save() {
  const text = JSON.stringify(exported(), null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `answers-${rater.replace(/[^\w-]+/g, "_")}-${HASH.slice(0, 8)}.json`;
  document.body.append(link);
  link.click();
  link.remove();
}

function setZoom({ scale, x, y }) {
  const within = (offset) => Math.min(0, Math.max(1 - scale, offset));
  zoom = { scale: scale, x: within(x), y: within(y) };
  for (const id of ["left", "right"]) {
    $(id).style.transform = `translate(${100 * zoom.x}%, ${100 * zoom.y}%) scale(${zoom.scale})`;
  }
  $("images").classList.toggle("zoomed", zoom.scale > 1);
}

function zoomAt(factor, px, py) {
  const scale = Math.min(12, Math.max(1, zoom.scale * factor));
  const ratio = scale / zoom.scale;
  setZoom({ scale: scale, x: px - (px - zoom.x) * ratio, y: py - (py - zoom.y) * ratio });
}

function followPointers(stage) {
  const pointers = new Map(); // those pressed: one drags, two pinch
  const placeOf = (event) => {
    const box = stage.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  };
  const spread = () => {
    const [a, b] = [...pointers.values()];
    return b ? { size: Math.hypot(a.x - b.x, a.y - b.y), x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 } : { size: 1, ...a };
  };
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, placeOf(event));
  });
  stage.addEventListener("pointermove", (event) => {
    if (!pointers.has(event.pointerId)) return;
    const before = spread();
    pointers.set(event.pointerId, placeOf(event));
    const after = spread();
    setZoom({ scale: zoom.scale, x: zoom.x + after.x - before.x, y: zoom.y + after.y - before.y });
    if (before.size > 0) zoomAt(after.size / before.size, after.x, after.y);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    stage.addEventListener(end, (event) => pointers.delete(event.pointerId));
  }
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    const { x, y } = placeOf(event);
    zoomAt(Math.exp(-event.deltaY / 300), x, y);
  }, { passive: false });
  stage.addEventListener("dblclick", (event) => {
    const { x, y } = placeOf(event);
    zoomAt(zoom.scale > 1 ? 1 / zoom.scale : 3, x, y);
  });
}

const KEYS = {
  ArrowLeft: () => answer("left"),
  ArrowRight: () => answer("right"),
  ArrowDown: () => answer("tie"),
  Enter: next,
  Backspace: back,
  "+": () => zoomAt(1.5, 0.5, 0.5),
  "=": () => zoomAt(1.5, 0.5, 0.5),
  "-": () => zoomAt(1 / 1.5, 0.5, 0.5),
  0: () => setZoom({ scale: 1, x: 0, y: 0 }),
};

function pressed(event) {
  if ($("compare").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  const number = Number(event.key) - 1;
  if (number in MANIFEST.questions) {
    active = number;
    showAnswers();
  } else if (event.key in KEYS && !event.repeat) {
    KEYS[event.key]();
  } else {
    return;
  }
  event.preventDefault();
}

makeQuestions();
showStart();
document.querySelectorAll(".stage").forEach(followPointers);
$("rater").onchange = showSaved;
$("begin").onclick = begin;
$("next").onclick = next;
$("back").onclick = back;
$("review").onclick = back;
$("export").onclick = save;
$("export-early").onclick = () => {
  choose($("rater").value);
  save();
};
document.addEventListener("keydown", pressed);
document.addEventListener("visibilitychange", () => {
  if ($("compare").hidden || !ready) return;
  if (document.hidden) stopWatch();
  else startWatch();
});
window.addEventListener("pagehide", () => {
  if (!$("compare").hidden && ready) {
    stopWatch();
    keep();
  }
});
