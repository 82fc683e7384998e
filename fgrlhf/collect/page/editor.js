// The page of fgrlhf/collect/human.py. The server measures the edit, keeps drafts and hands out
// records. This file shows them, and never builds markup from text. judge.js shows records of the
// kind "judge", two answers to compare; here are those of the kind "edit" and what both need.
"use strict";

const SAVE_AFTER = 250;                 // ms between two drafts while somebody types
const PATIENCE = 15000;                 // ms until a silent server counts as stopped
const RENEW_AFTER = 20000;              // ms; each message keeps the record for 90 s more
const SPEAK_AFTER = 1200;               // ms without typing until a screen reader reads the measure

const $ = id => document.getElementById(id);
const text = $("text");
const onMac = /Mac|iPhone|iPad/.test(navigator.platform);
const page = newId();                   // names this load of the page; `tab` survives a reload
let tab = sessionStorage.tab ||= newId();
let annotator = "", limit = 1, free = 0, largest = Infinity;
let record = null;                      // the record on the page, as the server sent it
let instructions = {};                  // of each kind of record that the program asks for
let known = [];                         // texts of the record, sent or confirmed, that the server may have
let queue = Promise.resolve();          // messages about the record go one after another
let moving = false, asking = false, saveTimer = 0, speakTimer = 0, lookTimer = 0;

function newId() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), n => n.toString(36)).join("");
}

// ----- talking to the server

class Refusal extends Error {           // the server refused, or did not answer (status 0)
  constructor(status, message) { super(message); this.status = status; }
}

const SILENT = "The program does not answer. Your text is kept in this browser. " +
  "Start the program again and open the address that it prints.";
const REASONS = {
  403: "The program does not know this address. Start it again with --public-url and " +
    "the address in your browser.",
  404: "The program has a new address. Open the address that it printed last. " +
    "Your drafts are there.",
  413: "The text is too long to be saved. Shorten it, or revert it.",
};

async function call(action, fields = {}, options = {}) {
  const body = JSON.stringify({annotator, tab, page, kind: record?.kind, ...fields});
  if (body.length > largest / 3 && new Blob([body]).size > largest) {
    throw new Refusal(413, REASONS[413]);
  }
  let answer;
  try {
    answer = await fetch(action, {method: "POST", body, signal: AbortSignal.timeout(PATIENCE),
                                  headers: {"Content-Type": "application/json"}, ...options});
  } catch {
    throw new Refusal(0, SILENT);
  }
  const type = answer.headers.get("Content-Type") ?? "";
  if (type.startsWith("text/plain") && REASONS[answer.status]) {
    throw new Refusal(answer.status, REASONS[answer.status]);
  }
  if (!type.startsWith("application/json")) throw new Refusal(0, SILENT);       // a proxy's page
  const result = await answer.json();
  if (!answer.ok) throw new Refusal(answer.status, result.error);
  return result;
}

function complain(error) {
  if (error.status === 409) return lose(error.message);
  if (!(error instanceof Refusal)) console.error(error);
  $("alert").textContent = error.message;
  $("alert").hidden = false;
  if (error.status === 0 && record) saveTimer ||= setTimeout(save, 2000);
}

// A textarea knows one kind of line end. The server gives every line its own line end back.
const plain = words => words.replace(/\r\n?/g, "\n");
const unchanged = () => text.value === plain(record.rejected);

// What a message about the record holds: its name, and the text if there is one to edit.
const content = () => ({id: record.id, text: record.kind === "edit" ? text.value : ""});

// ----- drafts: sent while typing; the browser keeps a copy until the server has confirmed

const copyName = () => `draft ${annotator} ${record.id}`;

function typed() {
  $("saved").textContent = "Saving…";
  saveTimer ||= setTimeout(save, SAVE_AFTER);
  localStorage[copyName()] = JSON.stringify({known, text: text.value});    // last: throws if full
}

function begin() {                      // with the browser's copy, if it is newer than the draft
  const copy = JSON.parse(localStorage[copyName()] ?? "null");
  const draft = plain(record.text);
  known = [draft];
  text.value = copy?.known.includes(draft) ? copy.text : draft;
  if (text.value !== draft) typed();
}

function save() {
  clearTimeout(saveTimer);
  saveTimer = 0;
  return queue = queue.then(() => record && (record.kind === "judge" ? renew(record)
                                                                     : send(record, text.value)));
}

async function send(about, value) {
  if (!known.includes(value)) known = [...known.slice(0, 7), value];
  try {
    const change = await call("save", {id: about.id, kind: about.kind, text: value});
    known = [value];
    if (text.value === value) {
      localStorage.removeItem(copyName());
      $("saved").textContent = "Draft saved";
    }
    $("alert").hidden = true;
    show(change);
  } catch (error) {
    $("saved").textContent = "Not saved";
    complain(error);
  }
}

setInterval(() => record && !moving && !saveTimer && save(), RENEW_AFTER);
addEventListener("pagehide", () => {
  if (record) call("leave", content(), {keepalive: true}).catch(() => {});
});
addEventListener("pageshow", event => event.persisted && location.reload());

// ----- showing

function show(change) {
  const parts = change.segments.flatMap(([kind, words], i, all) => {
    if (kind === "keep") return [words];
    const [, before, marked, after] = words.match(/^(\s*)(.*?)(\s*)$/s);   // no mark on spaces
    const mark = document.createElement(kind === "delete" ? "del" : "ins");
    mark.textContent = marked;
    mark.className = kind === "insert" && all[i - 1]?.[0] === "delete" ? "instead" : "";
    return [before, mark, after];
  });
  $("diff").replaceChildren(...parts);
  const over = change.over;
  const percent = share => `${Math.round(share * 100)}%`;
  const changed = over && percent(change.share) === percent(limit)
    ? `${(change.share * 100).toFixed(1)}%` : percent(change.share);
  const strong = document.createElement("strong");
  strong.textContent = changed;
  $("share").replaceChildren(strong, over ? ` changed, above the limit of ${percent(limit)}`
    : change.share > limit ? ` changed (${free} words may always change)`
    : ` changed (limit ${percent(limit)})`);
  const same = unchanged() ? "nothing changed yet" : "no word changed";
  $("tokens").textContent = change.changed === 0 ? same
    : `${change.changed} ${change.changed === 1 ? "word" : "words"}: ` +
      `${change.deleted} deleted, ${change.inserted} inserted, ${change.kept} kept`;
  $("measure").classList.toggle("over", over);
  const bar = document.querySelector(".bar");
  bar.firstElementChild.style.width = `${Math.min(change.share, 1) * 100}%`;
  bar.lastElementChild.style.left = `${limit * 100}%`;
  $("accept").setAttribute("aria-disabled", over);
  clearTimeout(speakTimer);
  speakTimer = setTimeout(() => {
    $("spoken").textContent = `${$("share").textContent}; ${$("tokens").textContent}`;
  }, SPEAK_AFTER);
}

function open(view) {
  record = view.record;
  clearTimeout(lookTimer);
  $("alert").hidden = true;
  $("saved").textContent = "";
  $("undo").disabled = !view.undo;
  $("count").textContent = `${view.done} of ${view.total} done`;
  $("progress").setAttribute("aria-valuemax", view.total);
  $("progress").setAttribute("aria-valuenow", view.done);
  $("progress").firstElementChild.style.width = `${100 * view.done / view.total}%`;
  if (!record) return rest(view);
  showOnly("record");
  guide(view.practised);
  $("prompt-text").textContent = record.prompt;
  $("input").hidden = !record.input;
  $("input-text").textContent = record.input ?? "";
  $("context").hidden = !record.context.length;
  $("context").open = false;
  $("context").replaceChildren($("context").firstElementChild, ...record.context.map(passage));
  $("context").firstElementChild.textContent =
    record.context.length === 1 ? "1 passage" : `${record.context.length} passages`;
  scrollTo(0, 0);
  if (record.kind === "judge") return openPair();
  $("preferred-text").textContent = record.chosen;
  compare(false);
  text.rows = 8 + record.rejected.length / 80;      // for browsers without field-sizing
  begin();
  show(record.change);
  clearTimeout(speakTimer);
  $("spoken").textContent = `${$("count").textContent}. Now: ${record.prompt}`;
  text.focus();
  text.setSelectionRange(0, 0);
}

function passage({title, text: words}) {
  const part = document.createElement("div"), heading = document.createElement("h3");
  part.className = "prose";
  part.dir = heading.dir = "auto";
  heading.textContent = title;
  part.append(heading, words);
  return part;
}

function guide(practised) {              // a paragraph, then numbered lines
  const judging = record.kind === "judge", other = document.body.dataset.kind !== record.kind;
  $("guide").open = (other || $("guide").open) && !practised;   // until the first record is done
  if (!other) return;
  document.body.dataset.kind = record.kind;
  document.title = document.querySelector("h1").textContent = judging ? "Blind pairs"
                                                                      : "Minimal edits";
  const link = document.querySelector(".skip-link");
  link.textContent = judging ? "Go to the answers" : "Go to the editor";
  link.href = judging ? "#pair-title" : "#text";
  const [summary, paragraph, list] = $("guide").children;
  summary.textContent = judging ? "How to judge" : "How to edit";
  const [head, ...rules] = instructions[record.kind].trim().split(/\n+/);
  paragraph.textContent = head;
  list.replaceChildren(...rules.map(rule => {
    const item = document.createElement("li");
    item.textContent = rule.replace(/^\d+\. /, "");
    return item;
  }));
}

function showOnly(id) {
  document.querySelector("header").hidden = false;
  for (const other of ["record", "finished"]) $(other).hidden = other !== id;
  document.querySelector("footer").hidden = id !== "record";
}

function pause(title, words, label, action) {
  record = null;
  showOnly("finished");
  const [heading, paragraph, button] = $("finished").children;
  heading.textContent = title;
  paragraph.textContent = words;
  button.textContent = label;
  button.onclick = () => action().catch(complain);
  $("finished").focus();
}

function rest(view) {                   // no record is free
  const elsewhere = view.total - view.done;
  if (elsewhere) {
    lookTimer = setTimeout(() => next().catch(complain), 5000);
    if (view.others === elsewhere) return restForOthers(view);
    pause(`No ${noun} is free now`,
          `${elsewhere} of ${view.total} ${noun}s ${elsewhere === 1 ? "is" : "are"} open in other ` +
          `tabs. A ${noun} that becomes free is shown here.`, "Look again", next);
  } else {
    pause(view.total === 1 ? `The ${noun} is done` : `All ${view.total} ${noun}s are done`,
          `You can still undo the last ${noun}. If you are finished, stop the program.`,
          "Stop the program", async () => {
            await call("finish");
            pause("Thank you!", "You can close this page.", "", async () => {});
            $("again").hidden = true;
          });
  }
}

function lose(reason) {                 // another page has the record: continue as a new tab
  tab = sessionStorage.tab = newId();
  pause("This page no longer has the record", reason, "Take another record", next);
}

// ----- the annotator's actions

async function next() { open(await call("next")); }

async function move(action, fields = {}, said = "") {        // an action that leaves this record
  if (moving) return;
  moving = text.readOnly = true;
  clearTimeout(saveTimer);
  saveTimer = 0;
  await queue;
  const copy = record?.kind === "edit" && copyName();
  try {
    const view = await call(action, record ? {...content(), ...fields} : fields);
    if (copy) localStorage.removeItem(copy);
    $("last").textContent = said;
    open(view);
  } catch (error) {
    complain(error);
  }
  moving = text.readOnly = false;
}

const acts = {
  async accept() {
    if (record?.kind !== "edit" || (unchanged() && !await ask("ask-same"))) return;
    await move("accept");
  },
  async skip() {
    if (!record) return;
    const form = $("ask-reason").firstElementChild;
    form.reset();                       // nobody skips with the reason of the last record
    needsText(false);
    if (!await ask("ask-reason")) return;
    await move("skip", {reason: new FormData(form).get("reason") || $("other").value});
  },
  async undo() {
    if ($("undo").disabled) return;
    await save();
    await move("undo");
  },
  revert() {
    if (record.kind !== "edit") return;
    text.focus();
    text.select();
    document.execCommand("insertText", false, plain(record.rejected));   // the browser can undo it
  },
  compare() { if (record.kind === "edit") compare($("preferred").hidden); },
  help() { ask("shortcuts"); },
  edit() { if (record.kind === "edit") text.focus(); },
  async name() {
    await save();
    if (await askName(annotator)) await move("next");
  },
};

function compare(shown) {
  $("preferred").hidden = !shown;
  $("compare").setAttribute("aria-expanded", shown);
  $("compare").firstElementChild.textContent = `${shown ? "Hide" : "Show"} preferred`;
}

async function ask(id) {                // true if the main button was chosen
  if (asking) return false;             // a dialog is open, or its close event is still to come
  asking = true;
  const dialog = $(id);
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise(resolve => { dialog.onclose = resolve; });
  asking = false;
  return dialog.returnValue === "ok";
}

async function askName(name) {
  $("annotator").value = name;
  if (!await ask("ask-name")) return false;
  annotator = localStorage.annotator = $("annotator").value.trim();
  $("name").textContent = `Annotator: ${annotator}`;
  return true;
}

// ----- keys and buttons

const KEYS = {p: "compare", r: "revert", k: "skip", z: "undo", e: "edit", "/": "help", "?": "help"};

addEventListener("keydown", event => {
  if (asking || plainKey(event)) return;
  const withLetter = onMac ? event.ctrlKey && event.shiftKey && !event.altKey && !event.metaKey
                           : event.altKey && !event.ctrlKey && !event.metaKey;
  const name = event.key === "Enter" ? (event.ctrlKey || event.metaKey) && "accept"
                                     : withLetter && KEYS[event.key.toLowerCase()];
  if (!name) return;
  event.preventDefault();
  const ready = record || (annotator && ["undo", "help"].includes(name));
  if (ready && !event.repeat) acts[name]();
});

for (const kbd of document.querySelectorAll("kbd[data-key]")) {
  const key = kbd.dataset.key, accept = key === "Enter";
  kbd.textContent = accept ? (onMac ? "⌘ Enter" : "Ctrl Enter") : `${onMac ? "⌃⇧" : "Alt "}${key}`;
  const button = kbd.closest("button");
  if (!button) continue;
  kbd.ariaHidden = "true";              // a screen reader gets the key from the next attribute
  button.setAttribute("aria-keyshortcuts", accept ? (onMac ? "Meta+Enter" : "Control+Enter")
                                                  : `${onMac ? "Control+Shift" : "Alt"}+${key}`);
}
for (const name of ["accept", "skip", "undo", "revert", "compare", "help", "name"]) {
  $(name).onclick = acts[name];
}
for (const cancel of document.querySelectorAll(".cancel")) {
  cancel.onclick = () => cancel.closest("dialog").close();
}
$("other").onfocus = () => $("other").closest("label").querySelector("[type=radio]").click();
$("ask-reason").onchange = event => {
  if (event.target.name === "reason") needsText(event.target.value === "");
};
function needsText(needed) {            // "Another reason" is one only with words
  $("other").required = needed;
  $("other").pattern = needed ? ".*\\S.*" : ".*";
}
text.oninput = typed;

async function first() {
  const options = await call("start");
  ({limit, free, largest, instructions} = options);
  annotator = options.annotator ?? localStorage.annotator ?? "";
  if (instructions.judge) nameThings();
  $("name").disabled = options.annotator !== null;
  $("name").textContent = `Annotator: ${annotator}`;
  while (!annotator) await askName("");
  await next();
}
addEventListener("DOMContentLoaded", () => first().catch(complain));      // judge.js is read by then
