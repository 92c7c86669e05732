// The routing explorer. Tokens are in the page; their weights are in the JSON of #data, in the same
// order. Texts and names become text nodes and attributes, never markup.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const tokens = [...document.querySelectorAll(".tokens > span")];
const place = new Map(tokens.map((token, i) => [token, i]));
// The slot of each token's heaviest adapter, from its class: a3.
const leads = tokens.map(({ className }) => (className ? Number(className.slice(1)) : null));
const parts = [...document.querySelectorAll(".tokens")].filter((part) => part.firstChild);
const panel = document.getElementById("panel");
const map = document.getElementById("map");
const kept = new Set(); // the slots that the legend keeps, none: all
const SHOWN = 8; // adapters in the panel; the others fold away

/** An element with these attributes; children are elements or text. */
function make(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A token's text with its white space made visible. */
function visible(text) {
  return text.replace(/\n/g, "↵").replace(/^ | $/g, "␣") || "(no text)";
}

function heading(i, note) {
  const quote = make("span", { class: "quote" }, visible(tokens[i].textContent));
  return make("p", {}, quote, " ", make("small", {}, note));
}

/** [[slot, weight], ...] of token i, heaviest first: --json's numbers. */
function averages(i) {
  const flat = data.tokens[i][1];
  return flat.filter((_, j) => j % 2 === 0).map((slot, j) => [slot, flat[2 * j + 1] / 1000]);
}

/** For each Linear the [[slot, weight], ...] of token i, heaviest first (page_weights.py). */
function linears(i) {
  const bytes = Uint8Array.from(atob(data.tokens[i][2]), (c) => c.charCodeAt(0));
  const size = data.names.length > 256 ? 3 : 2;
  return data.linears.map((_, linear) => {
    const pairs = [];
    for (let at = linear * data.k * size; at < (linear + 1) * data.k * size; at += size) {
      const slot = bytes[at] + (size === 3 ? 256 * bytes[at + 1] : 0);
      const weight = (bytes[at + size - 1] * data.unit) / 255;
      if (weight > 0) pairs.push([slot, weight]);
    }
    return pairs;
  });
}

function inWords(pairs) {
  return pairs.map(([slot, w]) => `${data.names[slot]} ${w.toFixed(2)}`).join(", ") || "no adapter";
}

// The panel ---------------------------------------------------------------------------------------

function row([slot, weight]) {
  const bar = make("span", { class: "bar", style: `--w:${Math.min(weight, 1)}` });
  const name = make("span", { title: data.names[slot] }, data.names[slot]);
  const mark = make("i", { "aria-hidden": "true" }, "■");
  return make("li", { class: `a${slot}` }, mark, name, bar, make("span", {}, weight.toFixed(3)));
}

let shown = null; // the token in the panel

/** Shows token i's weights, averaged over layers and modules. */
function show(i) {
  if (i === shown) return; // else a screen reader would say it twice
  shown = i;
  const part = tokens[i].parentElement;
  const number = i - place.get(part.firstChild) + 1;
  const which = `${part.getAttribute("aria-label")}, token ${number} of ${part.children.length}`;
  const pairs = averages(i);
  const rest = pairs.slice(SHOWN);
  const lines = [heading(i, which)];
  if (pairs.length) {
    lines.push(make("ul", {}, ...pairs.slice(0, SHOWN).map(row)));
    if (rest.length) {
      const sum = rest.reduce((total, [, weight]) => total + weight, 0).toFixed(3);
      const more = make("small", {}, `${rest.length} more, together ${sum}`);
      lines.push(make("details", {}, make("summary", {}, more), make("ul", {}, ...rest.map(row))));
    }
    const ess = (data.tokens[i][0] / 100).toFixed(2);
    lines.push(make("p", { class: "note" }, `Mean over the Linears. Effective number ${ess}.`));
  } else {
    lines.push(make("p", { class: "note" }, "No adapter weighs above zero here."));
  }
  panel.replaceChildren(...lines);
}

// The heat map ------------------------------------------------------------------------------------

/** A Linear's cell, in the colour of its heaviest adapter; grey where the token has no heaviest one
    (noneLeads) and two weigh the same here, too. */
function cell(pairs, layer, module, noneLeads) {
  const label = `layer ${layer}, ${module}: ${inWords(pairs)}`;
  const named = { title: label, "aria-label": label };
  const button = make("button", { type: "button", tabindex: -1, ...named }, "–");
  const [first, second] = pairs;
  if (!first) return button;
  button.textContent = first[1].toFixed(2);
  button.style.setProperty("--w", first[1] / data.unit);
  if (!(noneLeads && first[1] === second?.[1])) button.classList.add(`a${first[0]}`);
  return button;
}

/** Opens the heat map of token i: a row for each layer, a column for each module. */
function openMap(i) {
  const found = linears(i);
  const modules = [...new Set(data.linears.map(([, module]) => module))];
  const layers = new Map(data.linears.map(([layer]) => [layer, {}]));
  data.linears.forEach(([layer, module], j) => { layers.get(layer)[module] = found[j]; });
  const head = modules.map((module) => make("th", { scope: "col" }, module));
  const table = make("table", {}, make("tr", {}, make("th", { scope: "col" }, "layer"), ...head));
  for (const [layer, of] of layers) {
    const fill = (module) => of[module] ? cell(of[module], layer, module, leads[i] === null) : "";
    const cells = modules.map((module) => make("td", {}, fill(module)));
    table.append(make("tr", {}, make("th", { scope: "row" }, layer), ...cells));
  }
  const hint = "Point at a cell, or step through them, for its heaviest adapters, four at most.";
  const used = found.some((pairs) => pairs.length);
  const said = make("p", { class: "note" }, used ? hint : "No adapter weighs above zero in any Linear.");
  const tell = (event) => { if (event.target.title) said.textContent = event.target.title; };
  table.addEventListener("pointerover", tell);
  table.addEventListener("focusin", tell);
  table.addEventListener("keydown", stepCells);
  table.querySelector("button")?.setAttribute("tabindex", 0);
  map.replaceChildren(heading(i, "in every Linear"), said, ...(found.length ? [table] : []));
  map.hidden = false;
}

/** Arrow keys move from cell to cell. */
function stepCells(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return; // the browser's own keys
  const across = { ArrowLeft: -1, ArrowRight: 1 }[event.key] || 0;
  const down = { ArrowUp: -1, ArrowDown: 1 }[event.key] || 0;
  if (!across && !down) return;
  const from = event.target.closest("td");
  const row = from.closest("table").rows[from.parentElement.rowIndex + down];
  const button = row?.cells[from.cellIndex + across]?.querySelector("button");
  if (button) moveFocus(event.target, button);
  event.preventDefault();
}

// Tokens ------------------------------------------------------------------------------------------

/** Focus moves to another of a group of which one at a time is reached by Tab. */
function moveFocus(from, to) {
  from.setAttribute("tabindex", -1);
  to.setAttribute("tabindex", 0);
  to.focus();
}

let current = 0; // the token that Tab reaches

function select(i) {
  tokens[current].removeAttribute("aria-current");
  tokens[i].setAttribute("aria-current", "true");
  moveFocus(tokens[current], tokens[i]);
  current = i;
  show(i);
  if (!map.hidden) openMap(i);
}

/** The token that a key moves to from token i: the next, the last, the first of the next part. */
function target(key, i) {
  const part = parts.indexOf(tokens[i].parentElement);
  if (key === "ArrowUp" || key === "ArrowDown")
    return place.get(parts[part + (key === "ArrowUp" ? -1 : 1)]?.firstChild);
  return { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: tokens.length - 1 }[key];
}

function press(event, i) {
  if (event.altKey || event.ctrlKey || event.metaKey) return; // the browser's own keys
  if (event.key === "Enter" || event.key === " ") openMap(i);
  else {
    const to = target(event.key, i);
    if (!tokens[to]) return;
    select(to);
  }
  event.preventDefault();
}

/** Calls act(event, i) for events of this type on token i. */
function onTokens(type, act) {
  document.getElementById("requests").addEventListener(type, (event) => {
    if (place.has(event.target)) act(event, place.get(event.target));
  });
}

tokens.forEach((token, i) => {
  const text = token.textContent;
  token.setAttribute("role", "button");
  token.setAttribute("tabindex", i ? -1 : 0);
  const heaviest = data.names[leads[i]] ?? "no heaviest adapter";
  token.setAttribute("aria-label", `${visible(text)}, ${heaviest}`);
  if (/^\s*\n\s*$/.test(text) || !text) token.dataset.mark = text ? "↵" : "·";
});
onTokens("pointerover", (_, i) => show(i));
onTokens("focusin", (_, i) => show(i));
onTokens("keydown", press);
onTokens("click", (_, i) => { select(i); openMap(i); });
document.getElementById("requests").addEventListener("pointerleave", () => {
  if (tokens[current]?.hasAttribute("aria-current")) show(current); // the one clicked
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || map.hidden) return;
  map.hidden = true;
  tokens[current].focus();
});

// The legend --------------------------------------------------------------------------------------

document.getElementById("legend")?.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const slot = Number(button.dataset.slot);
  if (!kept.delete(slot)) kept.add(slot);
  button.setAttribute("aria-pressed", kept.has(slot));
  const fades = (i) => kept.size > 0 && !kept.has(leads[i]);
  tokens.forEach((token, i) => token.classList.toggle("faded", fades(i)));
});
