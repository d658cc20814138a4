"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("sort"), rows = document.getElementById("rows"), zoom = document.getElementById("zoom");
const signed = (value) => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(3);

function element(name, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
}

function choice(label, options) {
  const select = element("select", { ariaLabel: label, onchange: show });
  options.forEach(([value, text]) => select.append(element("option", { value, textContent: text })));
  form.append(select);
  return select;
}

const order = choice("order", [["worst", "worst change first"], ["best", "best change first"], ["number", "by number"]]);
const score = choice("score", data.scores.map((name) => [name, name]));
const system = choice("system", data.systems.slice(1).map((name, i) => [i + 1, name]));
system.hidden = data.systems.length < 3;
score.hidden = data.scores.length < 2;

const change = (row, at) => row.values[score.value][at] - row.values[score.value][0];

function figures(row, onclick) {
  const list = element("div", { className: "images" });
  list.style.setProperty("--columns", data.systems.length);
  data.systems.forEach((name, i) => {
    const caption = element("figcaption", {}, element("b", { textContent: name }));
    for (const measure of data.scores) {
      const value = row.values[measure][i], by = value - row.values[measure][0];
      caption.append(element("br"), `${measure} ${value.toFixed(3)} `);
      if (i) caption.append(element("span", { className: by > 0 ? "good" : by < 0 ? "bad" : "", textContent: signed(by) }));
    }
    const picture = element("img", { src: row.images[i], alt: `${name}: ${row.prompt}`, loading: "lazy" });
    const button = element("button", { type: "button", title: "enlarge", onclick: (event) => onclick(event, i) }, picture);
    list.append(element("figure", {}, button, caption));
  });
  return list;
}

function show() {
  const at = Number(system.value || 1), sign = { worst: 1, best: -1 }[order.value];
  const sorted = [...data.prompts].sort((a, b) => (sign ? sign * (change(a, at) - change(b, at)) : 0) || a.number - b.number);
  rows.replaceChildren(...sorted.map((row, place) => {
    const text = element("p", {}, element("small", { textContent: row.number }), row.prompt);
    return element("article", {}, text, figures(row, () => enlarge(sorted, place)));
  }));
}

// Side by side as large as fits; a click shows one image alone, the next click the next system in its place.
function enlarge(sorted, place) {
  const row = sorted[place];
  const list = figures(row, (event, i) => {
    const all = [...list.children], next = zoom.classList.contains("alone") ? (i + 1) % all.length : i;
    zoom.classList.add("alone");
    all.forEach((figure, j) => figure.classList.toggle("chosen", j === next));
    all[next].firstChild.focus();
  });
  const close = element("button", { type: "button", textContent: "close", onclick: () => zoom.close() });
  zoom.classList.remove("alone");
  zoom.replaceChildren(element("p", {}, element("span", { textContent: row.prompt }), close), list);
  zoom.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step && sorted[place + step]) enlarge(sorted, place + step);
  };
  if (!zoom.open) zoom.showModal();
}

const picture = new Image();
picture.onload = () => {
  const small = picture.naturalWidth <= 128, shown = Math.min(data.systems.length, 4) * (small ? 150 : 290);
  document.documentElement.style.setProperty("--pixels", small ? "pixelated" : "auto");
  rows.style.setProperty("--row", `${Math.min(shown + 30, 1240)}px`);
};
picture.src = data.prompts[0].images[0];
show();
