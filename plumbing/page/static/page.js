// The page of a run. What comes from devices and files is put in as text, never as markup.

import { BarChart, COLOURS, HeatMap, LineChart, h, legend, percent } from "./charts.js";

const PARTS = ["sending", "training", "receiving", "aggregating", "evaluating", "other"];
const PART_COLOURS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5"].map((name) => `var(${name})`);
const ROWS = 100; // of devices that are in the table at first; it grows by as many
const main = document.getElementById("main");
const link = document.getElementById("link");
const dialog = document.getElementById("dialog");

/** What the page knows of a run: the one that goes on, or one of the past. */
class Run {
  constructor() {
    this.clear();
  }

  clear() {
    this.config = {};
    this.name = this.address = "";
    this.status = { phase: "starting", round: 0 };
    this.rounds = [];
    this.events = [];
    this.devices = new Map();
  }

  /** Take what is new; all of it if it holds the settings. */
  take(news) {
    if (news.config) {
      this.clear();
      Object.assign(this, { config: news.config, name: news.name, address: news.address });
    }
    this.status = news.status;
    this.rounds.push(...news.rounds);
    this.events.push(...news.events);
    this.events.splice(0, this.events.length - 1000);
    for (const row of news.devices) this.devices.set(row.cid, { ...row, at: performance.now() });
  }
}

const live = new Run();
let isLive = false; // whether this server trains
let isOwner = false; // whether it has a list of admitted devices
let view = null; // {update(what), name}

// --- Words and numbers; a thousand rows need them often ---

const numbers = [0, 1, 2, 3].map((digits) => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
const natural = new Intl.Collator("en", { numeric: true }).compare;

const formats = {
  number: (value, digits = 0) => (typeof value === "number" ? numbers[digits].format(value) : ""),
  bytes(value) {
    if (!value) return "0 B";
    const power = Math.min(Math.floor(Math.log10(value) / 3), 4);
    return `${(value / 1000 ** power).toPrecision(3)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
  },
  seconds(value) {
    if (typeof value !== "number") return "";
    if (value === 0) return "0 s";
    if (value < 0.1) return `${(1000 * value).toFixed(0)} ms`;
    if (value < 90) return `${value.toFixed(1)} s`;
    const minutes = Math.round(value / 60);
    return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  },
  time: (stamp) => (stamp ? new Date(stamp).toLocaleTimeString("en-GB") : ""),
  date: (stamp) => (stamp ? new Date(stamp).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" }) : "never"),
  ago(stamp) {
    const seconds = Math.max(0, (Date.now() - Date.parse(stamp)) / 1000);
    return stamp ? (seconds < 5 ? "now" : `${formats.seconds(Math.floor(seconds)).replace(".0 s", " s")} ago`) : "";
  },
};

/** How far a device is, 0 to 1, carried on from its last report at its own rate. */
function progress(row, run) {
  if (row.state === "done") return 1;
  if (row.state !== "training" || !row.steps) return 0;
  const batch = run.config.batch_size || 32;
  const since = run === live && isLive ? (performance.now() - row.at) / 1000 : 0;
  return Math.min((row.step + (since * (row.rate || 0)) / batch) / row.steps, 0.99);
}

function stateText(row, run) {
  const share = progress(row, run);
  if (row.state === "training" && row.steps) return `training ${Math.floor(100 * share)} %`;
  return row.state === "done" ? "trained" : row.state;
}

function stateMark(row, run) {
  return h("span", { class: `state ${row.state.replace(" ", "-")}` }, stateText(row, run));
}

function heat(row) {
  const celsius = [row.cpu, row.gpu].filter((value) => value !== undefined);
  return celsius.length ? Math.max(...celsius) : undefined;
}

function heatText(row) {
  const celsius = heat(row);
  const words = [celsius !== undefined && `${celsius.toFixed(0)} °C`, row.throttled || (row.throttled_since_boot && `earlier: ${row.throttled_since_boot}`)];
  return words.filter(Boolean).join(", ");
}

function put(element, words) {
  if (element.textContent !== words) element.textContent = words;
}

function setBar(bar, share) {
  bar.firstChild.style.transform = `translateX(${(100 * share - 100).toFixed(1)}%)`;
  bar.classList.toggle("done", share >= 1);
}

function bar(extra = "") {
  return h("div", { class: `bar ${extra}`, "aria-hidden": "true" }, h("i"));
}

function card(width, title, note, ...content) {
  return h("section", { class: `card ${width}` }, h("header", {}, h("h2", {}, title), note ? h("p", {}, note) : null), ...content);
}

// --- Where one is: #/run, #/device/3, #/past/NAME/run … ---

function parts() {
  return location.hash.replace(/^#\//, "").split("/").map(decodeURIComponent);
}

function to(...words) {
  return `#/${words.map(encodeURIComponent).join("/")}`;
}

async function get(path, options) {
  const answer = await fetch(path, options);
  const type = answer.headers.get("content-type") || "";
  const body = type.includes("json") ? await answer.json() : { problem: (await answer.text()).trim() };
  if (!answer.ok) throw new Error(body.problem || `the server answers ${answer.status}`);
  return body;
}

const past = new Map(); // runs by name, as fetched

async function pastRun(name) {
  if (!past.has(name)) {
    const run = new Run();
    run.take(await get(`api/runs/${encodeURIComponent(name)}`));
    past.set(name, run);
  }
  return past.get(name);
}

async function show() {
  let [first, ...rest] = parts();
  let run = live, prefix = [];
  if (!first) first = isLive ? "run" : "runs";
  try {
    if (first === "past") {
      run = await pastRun(rest[0]);
      prefix = ["past", rest[0]];
      [first, ...rest] = [rest[1] || "run", ...rest.slice(2)];
    }
    const make = { run: runView, devices: devicesView, device: deviceView, events: eventsView, runs: runsView, compare: compareView, owner: ownerView }[first];
    if (!make) throw new Error("there is no such view");
    const next = await make(run, prefix, rest);
    main.replaceChildren(...next.content);
    view = { run, update: next.update || (() => {}) };
    view.update(true);
  } catch (error) {
    view = null;
    main.replaceChildren(h("h1", {}, "This cannot be shown"), h("p", { class: "problem" }, error.message));
  }
  tabs(run, prefix, first);
}

function tabs(run, prefix, current) {
  const names = run === live && !isLive ? [] : [["run", "Run"], ["devices", "Devices"], ["events", "Events"]];
  const entries = names.map(([name, title]) => [to(...prefix, name), title, current === name || (name === "devices" && current === "device")]);
  entries.push([to("runs"), "Runs", current === "runs" || current === "compare"]);
  if (isOwner) entries.push([to("owner"), "Owner", current === "owner"]);
  document.getElementById("tabs").replaceChildren(...entries.map(([href, title, is]) => h("li", {}, h("a", { href, "aria-current": is && "page" }, title))));
  const title = run.name || "Federated learning";
  put(document.querySelector(".brand span"), title);
  document.querySelector(".brand").href = names.length ? to(...prefix, "run") : to("runs");
  document.title = title;
}

// --- This run ---

function runView(run, prefix) {
  const facts = ["Test accuracy", "Test loss", "Devices", "Bytes"].map((title) => {
    const value = h("p", { class: "big" }, "–"), note = h("p", { class: "note" });
    return { title, value, note, card: h("section", { class: "card fact w3" }, h("h2", {}, title), value, note) };
  });
  const title = h("h1"), lead = h("p", { class: "lead" }), phase = h("h2"), whole = bar("thick"), left = h("p", {});
  const accuracy = new LineChart(220, "Test accuracy by round"), loss = new LineChart(220, "Test loss by round");
  const classes = new HeatMap(200, "Accuracy by class and round"), seconds = new BarChart(240, "Seconds by round");
  const bytes = new BarChart(200, "Bytes by round");
  const people = h("ul", { class: "people" }), peopleNote = h("p", {});
  const files = h("p", { class: "note files" }), latest = h("ul", { class: "log short" });
  const content = [
    title, lead,
    h("div", { class: "grid" },
      h("section", { class: "card w12" }, h("header", {}, phase, left), whole),
      ...facts.map((fact) => fact.card),
      h("section", { class: "card w12" }, h("header", {}, h("h2", {}, "Devices now"), peopleNote), people),
      card("w6", "Accuracy", "on the server's test images", accuracy.element),
      card("w6", "Loss", "cross-entropy on the same images", loss.element),
      card("w6", "Accuracy by class", null, classes.element, h("ul", { class: "legend" }, h("li", {}, "0 %", h("i", { class: "scale" }), "100 %"))),
      card("w6", "Seconds by round", "the slowest device's, then the server's", seconds.element, legend(PARTS.map((name, i) => [name, PART_COLOURS[i]]))),
      card("w6", "Bytes by round", null, bytes.element, legend([["to devices", COLOURS[0]], ["from devices", COLOURS[2]]])),
      card("w6", "Latest events", h("a", { href: to(...prefix, "events") }, "all events"), latest),
    ),
    files,
  ];
  files.append("Files of this run: ", ...fileLinks(run.name, ["report.png", "model.safetensors", "config.json", "metrics.jsonl"]));
  let drawn = -1, shownEvent = -1;

  function update() {
    const { config, status, rounds } = run, last = rounds.at(-1), first = rounds[0];
    put(title, `${config.model || "Model"}, ${config.strategy || ""}`.replace(/, $/, ""));
    put(lead, [config.test_images && `tested on ${config.test_images}`, run.address && `devices join at ${run.address}`].filter(Boolean).join(" · "));
    const total = config.rounds || rounds.length, phases = { training: `Round ${status.round} of ${total}`, waiting: `Waiting for ${status.needed} device${status.needed === 1 ? "" : "s"}`, finished: `Finished after ${rounds.length} rounds` };
    const rows = [...run.devices.values()], busy = rows.filter((row) => ["training", "done"].includes(row.state));
    put(phase, phases[status.phase] || (status.phase === "aggregating and testing" ? `Round ${status.round} of ${total}: aggregating and testing` : status.phase[0].toUpperCase() + status.phase.slice(1)));
    const share = busy.length ? busy.reduce((sum, row) => sum + progress(row, run), 0) / busy.length : 0;
    const inRound = status.phase === "training" ? share : status.phase === "aggregating and testing" ? 0.98 : 0;
    setBar(whole, total ? Math.min((rounds.length + inRound) / total, 1) : 0);
    const usual = rounds.slice(-5).map((row) => row.seconds).sort((a, b) => a - b)[Math.floor(Math.min(rounds.length, 5) / 2)];
    const due = usual && isLive && run === live && !["finished", "waiting"].includes(status.phase) ? usual * Math.max(total - rounds.length - inRound, 0) : 0;
    put(left, [status.phase === "waiting" && `${status.connected} connected`, status.phase === "training" && `${status.done || 0} of ${status.sampled} devices done`, due && `about ${due < 90 ? `${Math.ceil(due)} s` : formats.seconds(due)} left`].filter(Boolean).join(" · "));
    const best = rounds.reduce((a, b) => (b.accuracy > (a?.accuracy ?? -1) ? b : a), null);
    const connected = rows.filter((row) => !["gone", "refused"].includes(row.state)), odd = rows.filter((row) => ["late", "left out", "refused"].includes(row.state));
    const sent = rounds.reduce((sum, row) => sum + row.sent, 0), received = rounds.reduce((sum, row) => sum + row.received, 0);
    const values = [
      [last ? percent(last.accuracy) : "–", best ? `best: ${percent(best.accuracy)} in round ${best.round}` : "after the first round"],
      [last?.loss != null ? last.loss.toFixed(3) : "–", last && first !== last && first.loss != null ? `${first.loss.toFixed(3)} in round ${first.round}` : ""],
      [run === live && isLive ? `${connected.length}` : `${rows.filter((row) => row.sent).length}`, odd.length ? `${odd.length} late, left out or refused` : last ? `${last.counted} of ${last.sampled} counted in the last round` : ""],
      [formats.bytes(sent + received), `${formats.bytes(sent)} to and ${formats.bytes(received)} from devices`],
    ];
    facts.forEach((fact, i) => (put(fact.value, values[i][0]), put(fact.note, values[i][1])));
    updatePeople(people, peopleNote, rows, run, prefix);
    const newest = run.events.at(-1)?.version;
    if (newest !== shownEvent) latest.replaceChildren(...eventLines(run.events.slice(-6).reverse(), prefix));
    shownEvent = newest;
    const stamp = rounds.length ? last.round * 1e6 + rounds.length : 0;
    if (stamp !== drawn) {
      drawn = stamp;
      const numbers = rounds.map((row) => row.round);
      accuracy.set({ series: [{ name: "accuracy", points: rounds.map((row) => [row.round, row.accuracy]), colour: COLOURS[0] }], low: 0, high: 1, format: (value) => (Number.isInteger(value * 100) ? `${value * 100} %` : percent(value)) });
      loss.set({ series: [{ name: "loss", points: rounds.map((row) => [row.round, row.loss]), colour: COLOURS[1] }], low: 0, format: (value) => +value.toFixed(3) + "" });
      classes.set({ rounds: numbers, rows: Object.keys(last?.classes || {}).map((name) => [name, rounds.map((row) => row.classes[name])]) });
      seconds.set({ rounds: numbers, parts: rounds.map((row) => row.parts), names: PARTS, colours: PART_COLOURS, format: formats.seconds });
      bytes.set({ rounds: numbers, parts: rounds.map((row) => [row.sent, row.received]), names: ["to devices", "from devices"], colours: [COLOURS[0], COLOURS[2]], format: formats.bytes });
    }
  }
  return { content, update };
}

/** Show each of up to 12 devices with its bar; of more those that are farthest behind. */
function updatePeople(list, note, rows, run, prefix) {
  const shown = rows.filter((row) => row.state !== "gone" && row.state !== "refused");
  const count = {};
  rows.forEach((row) => (count[row.state] = (count[row.state] || 0) + 1));
  put(note, Object.entries(count).map(([state, n]) => `${n} ${state}`).join(" · "));
  shown.sort((a, b) => (shown.length > 12 ? progress(a, run) - progress(b, run) || natural(a.cid, b.cid) : natural(a.cid, b.cid)));
  const chosen = shown.slice(0, 12);
  while (list.children.length > chosen.length) list.lastChild.remove();
  while (list.children.length < chosen.length) list.append(h("li", {}, h("a", { href: "#" }), h("small"), bar()));
  chosen.forEach((row, i) => {
    const [name, words, line] = list.children[i].children;
    put(name, `device ${row.cid}`);
    const href = to(...prefix, "device", row.cid);
    if (name.getAttribute("href") !== href) name.setAttribute("href", href);
    put(words, [stateText(row, run), row.rate && row.state === "training" && `${formats.number(row.rate)} images/s`].filter(Boolean).join(" · "));
    setBar(line, progress(row, run));
  });
}

function fileLinks(run, names) {
  return names.flatMap((name, i) => [i ? " · " : "", h("a", { href: `runs/${encodeURIComponent(run)}/${name}` }, name)]);
}

// --- Devices ---

const TROUBLE = ["late", "left out", "refused", "gone"];
const ORDER = ["training", "done", "late", "idle", "left out", "refused", "gone"];
const COLUMNS = [
  ["cid", "Device", (row) => row.cid, natural],
  ["board", "Board", (row) => [row.board, row.machine].filter(Boolean).join(", ")],
  ["state", "State", null, (a, b) => a - b, (row, run) => ORDER.indexOf(row.state) - progress(row, run)],
  ["images", "Images", (row) => formats.number(row.images || undefined), null, (row) => row.images, "n"],
  ["rate", "Images/s", (row) => formats.number(row.rate), null, (row) => row.rate, "n"],
  ["loss", "Loss", (row) => formats.number(row.loss, 3), null, (row) => row.loss, "n"],
  ["heat", "Heat", null, null, heat, "n"],
  ["ram", "RAM", (row) => (row.ram ? `${formats.number(row.ram)} MB` : ""), null, (row) => row.ram, "n"],
  ["free", "Free", (row) => (row.free ? `${formats.number(row.free)} MB` : ""), null, (row) => row.free, "n"],
  ["watts", "Watts", (row) => formats.number(row.watts, 1), null, (row) => row.watts, "n"],
  ["sent", "Bytes", (row) => formats.bytes(row.sent + row.received), null, (row) => row.sent + row.received, "n"],
  ["seen", "Seen", (row) => formats.ago(row.seen), null, (row) => row.seen || ""],
];
const sorting = { column: "cid", down: false };

function devicesView(run, prefix) {
  const search = h("input", { type: "search", placeholder: "Filter: a name, a board, a state", "aria-label": "Filter the devices" });
  const shownNote = h("p", { class: "note", role: "status" });
  const heads = COLUMNS.map(([key, title, , , , kind]) => h("th", { scope: "col", class: kind === "n" && "n" }, h("button", { type: "button", onclick: () => sortBy(key) }, title)));
  const body = h("tbody"), lines = new Map();
  const more = h("button", { type: "button", onclick: () => ((most += 5 * ROWS), arrange()) });
  let most = ROWS;
  const content = [
    h("h1", {}, "Devices"), h("p", { class: "lead" }, "What each device reports of itself, and what the server thinks of it."),
    h("section", { class: "card" }, h("div", { class: "tools" }, search, shownNote), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of devices" }, h("table", {}, h("caption", { class: "hidden" }, "Devices of this run"), h("thead", {}, h("tr", {}, ...heads)), body)), h("p", { class: "more" }, more)),
  ];
  search.addEventListener("input", () => arrange());

  function sortBy(key) {
    sorting.down = sorting.column === key ? !sorting.down : false;
    sorting.column = key;
    arrange();
  }

  function line(row) {
    let found = lines.get(row.cid);
    if (!found) {
      const cells = COLUMNS.map(([key, , , , , kind]) => h(key === "cid" ? "th" : "td", { class: kind, scope: key === "cid" && "row" }));
      const name = h("a", { href: to(...prefix, "device", row.cid) }, row.cid), state = h("span", { class: "state" }), share = bar(), why = h("small");
      const celsius = h("span"), throttled = h("small");
      cells[6].append(celsius, throttled);
      cells[0].append(name);
      cells[2].append(state, share, why);
      found = { tr: h("tr", {}, ...cells), cells, state, share, why, celsius, throttled, row: null };
      lines.set(row.cid, found);
    }
    if (found.row !== row) {
      found.row = row;
      COLUMNS.forEach(([, , words], i) => i && words && put(found.cells[i], words(row)));
      put(found.celsius, heat(row) === undefined ? "" : `${heat(row).toFixed(0)} °C`);
      put(found.throttled, row.throttled || "");
      put(found.why, TROUBLE.includes(row.state) ? row.why || "" : "");
      found.cells[6].classList.toggle("hot", Boolean(row.throttled));
    }
    return found;
  }

  function refresh() {
    for (const found of lines.values()) {
      if (!found.row || !found.tr.isConnected) continue;
      const words = stateText(found.row, run);
      if (words !== found.state.textContent) {
        found.state.textContent = words;
        found.state.className = `state ${found.row.state.replace(" ", "-")}`;
      }
      found.share.hidden = found.row.state !== "training";
      setBar(found.share, progress(found.row, run));
      put(found.cells[11], formats.ago(found.row.seen));
    }
  }

  function arrange() {
    const [, , words, compare, key] = COLUMNS.find(([name]) => name === sorting.column);
    const value = key || ((row) => words(row)), order = compare || ((a, b) => (typeof a === "number" && typeof b === "number" ? a - b : natural(String(a ?? ""), String(b ?? ""))));
    heads.forEach((head, i) => (COLUMNS[i][0] === sorting.column ? head.setAttribute("aria-sort", sorting.down ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
    const wanted = search.value.trim().toLowerCase();
    const rows = [...run.devices.values()].filter((row) => `${row.cid} ${row.board || ""} ${row.state} ${row.why || ""}`.toLowerCase().includes(wanted));
    const keyed = rows.map((row) => [value(row, run), row]);
    const empty = (v) => v === undefined || v === "";
    keyed.sort(([a, ra], [b, rb]) => empty(a) - empty(b) || (sorting.down ? -1 : 1) * order(a, b) || natural(ra.cid, rb.cid));
    const trs = keyed.slice(0, most).map(([, row]) => line(row).tr), now = body.children;
    more.parentNode.hidden = rows.length <= most;
    put(more, `Show more of the ${formats.number(rows.length)}`);
    if (trs.length !== now.length || trs.some((tr, i) => tr !== now[i])) body.replaceChildren(...trs);
    put(shownNote, rows.length < run.devices.size ? `${rows.length} of ${run.devices.size} devices` : `${rows.length} device${rows.length === 1 ? "" : "s"}`);
    refresh();
  }

  let arranged = 0;
  function update(all) {
    if (all || performance.now() - arranged > 900) {
      arranged = performance.now();
      arrange();
    }
  }
  return { content, update };
}

async function deviceView(run, prefix, [cid]) {
  const row = () => run.devices.get(cid);
  if (!row()) throw new Error(`this run has no device ${cid}`);
  const facts = h("dl"), chartsGrid = h("div", { class: "w8 grid" }), dropped = h("ul", { class: "log" });
  const charts = [["loss", "Training loss", (v) => +v.toFixed(3) + ""], ["rate", "Images a second", (v) => formats.number(v)], ["seconds", "Seconds a round", formats.seconds], ["cpu", "Processor, °C", (v) => formats.number(v)], ["gpu", "GPU, °C", (v) => formats.number(v)], ["ram", "Peak RAM, MB", (v) => formats.number(v)], ["watts", "Watts", (v) => formats.number(v, 1)]];
  const drawn = charts.map(([key, title, format], i) => {
    const chart = new LineChart(170, title);
    return { key, title, format, chart, card: card("w6", title, null, chart.element), colour: COLOURS[i] };
  });
  const content = [
    h("h1", {}, `Device ${cid}`), h("p", { class: "lead" }, h("a", { href: to(...prefix, "devices") }, "← all devices")),
    h("div", { class: "grid" }, h("div", { class: "w4 grid" }, card("w12", "Now", null, facts), card("w12", "What did not count", null, dropped)), chartsGrid),
  ];
  let fetched = -1;

  async function update() {
    const now = row() || {};
    const known = [["state", stateText(now, run)], ["last problem", now.why], ["board", now.board], ["processor", [now.machine, now.cores && `${now.cores} cores`, now.device].filter(Boolean).join(", ")], ["images", now.data || formats.number(now.images || undefined)], ["rate", now.rate && `${formats.number(now.rate)} images/s`], ["loss", formats.number(now.loss, 3)], ["heat", heatText(now)], ["peak RAM", now.ram && `${formats.number(now.ram)} MB`], ["free RAM", now.free && `${formats.number(now.free)} MB`], ["power", now.watts && `${formats.number(now.watts, 1)} W`], ["sent to it", formats.bytes(now.sent)], ["received from it", formats.bytes(now.received)], ["last seen", formats.ago(now.seen)]].filter(([, value]) => value);
    const fresh = known.map(([name, value]) => `${name}\n${value}`).join("\n");
    if (facts.dataset.fresh !== fresh) {
      facts.dataset.fresh = fresh;
      facts.replaceChildren(...known.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
    }
    if (fetched === run.rounds.length) return;
    fetched = run.rounds.length;
    const path = `api/runs/${encodeURIComponent(run.name)}/devices/${encodeURIComponent(cid)}`;
    const { rounds } = await get(path).catch(() => ({ rounds: [] })); // the server may be away: next time
    const shown = drawn.filter(({ key }, i) => i < 3 || rounds.some((point) => point[key] !== undefined));
    chartsGrid.replaceChildren(...shown.map((one) => one.card));
    for (const { key, title, format, chart, colour } of shown)
      chart.set({ series: [{ name: title.toLowerCase(), colour, points: rounds.filter((point) => point[key] !== undefined).map((point) => [point.round, point[key]]) }], low: key === "loss" ? undefined : 0, format, empty: "no round counted yet" });
    const lost = rounds.filter((point) => point.dropped);
    dropped.replaceChildren(...(lost.length ? lost.map((point) => h("li", {}, h("b", {}, `round ${point.round}`), h("span", {}, point.dropped))) : [h("li", {}, h("span", {}, "Every update of this device counted."))]));
  }
  return { content, update };
}

// --- Events ---

function eventLines(events, prefix) {
  if (!events.length) return [h("li", {}, h("span", {}, "No events yet."))];
  return events.map((event) => h("li", {}, h("time", { datetime: event.time, title: formats.date(event.time) }, formats.time(event.time)), event.cid ? h("a", { href: to(...prefix, "device", event.cid) }, `device ${event.cid}`) : h("b", {}, "server"), h("span", {}, event.text)));
}

function eventsView(run, prefix) {
  const list = h("ul", { class: "log" }), search = h("input", { type: "search", placeholder: "Filter: refused, dropped, device 3", "aria-label": "Filter the events" });
  let seen = 0;
  const content = [h("h1", {}, "Events"), h("p", { class: "lead" }, "Joins, losses, drops and retries, the newest first."), h("section", { class: "card" }, h("div", { class: "tools" }, search), list)];

  function update(all) {
    const newest = run.events.at(-1)?.version || 0;
    if (!all && newest === seen) return;
    seen = newest;
    const wanted = search.value.trim().toLowerCase();
    const chosen = run.events.filter((event) => `${event.kind} device ${event.cid} ${event.text}`.toLowerCase().includes(wanted)).slice(-400).reverse();
    list.replaceChildren(...eventLines(chosen, prefix));
  }
  search.addEventListener("input", () => update(true));
  return { content, update };
}

// --- Runs, and several laid over each other ---

const chosenRuns = new Set();

async function runsView() {
  const { runs } = await get("api/runs");
  const compare = h("button", { type: "button", class: "main", onclick: () => (location.hash = to("compare", ...chosenRuns)) }, "Compare");
  const note = () => ((compare.disabled = chosenRuns.size < 2), (compare.textContent = chosenRuns.size ? `Compare ${chosenRuns.size} runs` : "Compare"));
  const rows = runs.map((run) => {
    const box = h("input", { type: "checkbox", "aria-label": `Compare ${run.name}`, onchange: (event) => (chosenRuns[event.target.checked ? "add" : "delete"](run.name), note()) });
    box.checked = chosenRuns.has(run.name);
    const last = run.accuracy.at(-1);
    return h("tr", {},
      h("td", {}, box), h("th", { scope: "row" }, h("a", { href: run.live && isLive ? to("run") : to("past", run.name, "run") }, run.name), run.live ? h("span", { class: "state training" }, "now") : null),
      h("td", {}, run.started ? formats.date(run.started * 1000) : ""), h("td", {}, run.model || ""), h("td", {}, run.strategy || ""),
      h("td", { class: "n" }, `${run.finished} of ${run.rounds ?? "?"}`), h("td", { class: "n" }, String(run.devices)), h("td", { class: "n" }, last ? percent(last[1]) : "–"),
      h("td", {}, ...fileLinks(run.name, run.files)));
  });
  note();
  return {
    content: [
      h("h1", {}, "Runs"), h("p", { class: "lead" }, "All that was left in runs/, the newest first. Choose two or more to lay them over each other."),
      h("section", { class: "card" }, h("div", { class: "tools" }, compare),
        runs.length ? h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of runs" }, h("table", {}, h("caption", { class: "hidden" }, "Runs"), h("thead", {}, h("tr", {}, h("td", {}, h("span", { class: "hidden" }, "Compare")), ...["Run", "Started", "Model", "Strategy", "Rounds", "Devices", "Accuracy", "Files"].map((title, i) => h("th", { scope: "col", class: [4, 5, 6].includes(i) && "n" }, title)))), h("tbody", {}, ...rows))) : h("p", { class: "empty" }, "No run has finished a round yet.")),
    ],
  };
}

async function compareView(_, __, names) {
  const { runs } = await get("api/runs");
  const chosen = names.map((name) => runs.find((run) => run.name === name)).filter(Boolean);
  if (chosen.length < 2) throw new Error("choose two runs or more in the list");
  const accuracy = new LineChart(300, "Test accuracy"), loss = new LineChart(300, "Test loss");
  const keys = [...new Set(chosen.flatMap((run) => Object.keys(run.config)))].filter((key) => !["run_id", "run_dir", "resume"].includes(key)).sort();
  const differs = (key) => new Set(chosen.map((run) => JSON.stringify(run.config[key] ?? null))).size > 1;
  const rows = keys.sort((a, b) => differs(b) - differs(a)).map((key) => h("tr", { class: differs(key) && "differs" }, h("th", { scope: "row" }, key, differs(key) ? h("span", { class: "hidden" }, " (differs)") : null), ...chosen.map((run) => h("td", { class: "set" }, run.config[key] == null ? "–" : String(run.config[key])))));
  const colours = chosen.map((run, i) => [run.name, COLOURS[i % COLOURS.length]]);
  return {
    content: [
      h("h1", {}, `${chosen.length} runs compared`), h("p", { class: "lead" }, h("a", { href: to("runs") }, "← all runs")),
      h("div", { class: "grid" },
        card("w6", "Accuracy", null, accuracy.element, legend(colours)), card("w6", "Loss", null, loss.element, legend(colours)),
        card("w12", "Settings", `${keys.filter(differs).length} of ${keys.length} differ; they come first and are marked ≠`, h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of settings" }, h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Setting"), ...chosen.map((run) => h("th", { scope: "col" }, run.name)))), h("tbody", {}, ...rows))))),
    ],
    update(all) {
      if (!all) return;
      accuracy.set({ series: chosen.map((run) => ({ name: run.name, points: run.accuracy })), low: 0, format: percent });
      loss.set({ series: chosen.map((run) => ({ name: run.name, points: run.loss })), low: 0, format: (value) => +value.toFixed(3) + "" });
    },
  };
}

// --- The owner's part ---

async function ownerView() {
  const { devices } = await get("api/owner");
  const post = (path, body) => get(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body || {}) });

  async function token() {
    const { commands, hours, uses } = await post("api/owner/token");
    ask(`A new device joins with one of these`, [
      h("p", { class: "note" }, `Valid for ${hours} hours or ${uses} devices; give each its own --cid. Whoever has it can join, so hand it over in private.`),
      ...Object.entries(commands).flatMap(([where, command]) => [h("h3", {}, where), h("pre", { tabindex: 0 }, command)]),
    ], [["Close"]]);
  }

  function revoke(cid) {
    ask(`Revoke device ${cid}?`, [h("p", {}, "It is cut off within a second, and its key does not let it in again. Open tokens are closed, too."), h("p", { class: "problem", role: "alert" })], [["Cancel"], ["Revoke", "risky", async () => {
      await post("api/owner/revoke", { cid });
      await show();
    }]]);
  }

  const rows = devices.map((device) => h("tr", {},
    h("th", { scope: "row" }, device.cid), h("td", {}, formats.date(device.admitted * 1000)), h("td", {}, device.how), h("td", {}, formats.date(device.seen && device.seen * 1000)), h("td", {}, device.address), h("td", {}, `${device.key}…`),
    h("td", {}, device.revoked ? h("span", { class: "state gone" }, `revoked ${formats.date(device.revoked * 1000)}`) : h("button", { type: "button", class: "risky", onclick: () => revoke(device.cid) }, "Revoke", h("span", { class: "hidden" }, ` device ${device.cid}`)))));
  return {
    content: [
      h("h1", {}, "Owner"), h("p", { class: "lead" }, "Who may take part. Only the address with the key that the server printed opens this part."),
      h("section", { class: "card" }, h("div", { class: "tools" }, h("button", { type: "button", class: "main", onclick: () => token().catch(report) }, "New join token")),
        devices.length ? h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of admitted devices" }, h("table", {}, h("caption", { class: "hidden" }, "Admitted devices"), h("thead", {}, h("tr", {}, ...["Device", "Admitted", "By", "Last seen", "From", "Key", "Admission"].map((title) => h("th", { scope: "col" }, title)))), h("tbody", {}, ...rows))) : h("p", { class: "empty" }, "No device was admitted yet: make a token, and start one with it.")),
    ],
  };
}

/** Ask in a dialog. buttons: [[words, class, what to do]]; it closes when that is done. */
function ask(title, content, buttons) {
  const menu = buttons.map(([words, kind, act]) => h("button", { type: "button", class: kind, onclick: async () => {
    try {
      if (act) await act();
      dialog.close();
    } catch (error) {
      report(error);
    }
  } }, words));
  dialog.replaceChildren(h("h2", { id: "dialog-title" }, title), ...content, h("menu", {}, ...menu.map((button) => h("li", { class: "plain" }, button))));
  dialog.showModal();
}

function report(error) {
  const place = dialog.open && dialog.querySelector(".problem");
  if (place) put(place, error.message);
  else ask("That did not work", [h("p", { class: "problem" }, error.message)], [["Close"]]);
}

// --- What is new ---

function connect() {
  const source = new EventSource("api/live");
  source.onopen = () => setLink("live", "live");
  source.onmessage = (event) => {
    const before = live.name;
    live.take(JSON.parse(event.data));
    isLive = true;
    setLink("live", "live");
    if (!view || before !== live.name) show();
    else changed = true;
  };
  source.onerror = () => {
    setLink("lost", live.status.phase === "finished" ? "the run has finished" : "no connection; trying again");
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
  };
}

function setLink(state, words) {
  link.dataset.state = state;
  put(link, words);
}

let changed = false;
setInterval(() => {
  if (!view || (view.run !== live && !changed) || document.hidden) return;
  changed = false;
  view.update(false);
}, 500);

async function begin() {
  window.addEventListener("hashchange", () => show().then(() => main.focus({ preventScroll: true })));
  try {
    ({ owner: isOwner, live: isLive } = await get("api/runs"));
  } catch (error) {
    setLink("lost", error.message);
  }
  if (isLive) connect();
  else setLink("past", "past runs");
  if (!isLive) show();
}

begin();
