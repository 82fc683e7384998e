// Records of the kind "judge": two answers side by side, blind. Which system gave which answer is
// known to the server only. editor.js, which is read before this file, has what both kinds need.
"use strict";

const SETTLE = 350;                     // ms in which a new pair takes no key: a key hit twice
const SAID = {left: "Answer 1 was chosen", right: "Answer 2 was chosen", tie: "A tie was chosen"};
let noun = "record", shownAt = 0, held = "", marking = false;

function nameThings() {                 // in a program that asks for judgements
  noun = "pair";
  $("ask-name-title").textContent = "Who is judging?";
  $("decided").textContent = instructions.edit ? "judgement and edit" : "judgement";
  $("undo").firstElementChild.textContent = "Undo last choice";
}

function openPair() {
  fill();
  clearTimeout(speakTimer);
  const done = $("last").textContent;
  $("spoken").textContent =
    `${done && `${done}. `}${$("count").textContent}. Now: ${record.prompt}`;
  shownAt = performance.now();
  $("pair-title").focus({preventScroll: true});
}

function fill() {                       // the two answers, with marks where they differ
  for (const [i, id] of ["left", "right"].entries()) {
    const parts = record.answers[i];
    const blank = !parts.some(([, words]) => words.trim());
    $(id).classList.toggle("blank", blank);
    $(id).replaceChildren(...blank ? ["The answer is empty."] : parts.map(([differs, words]) => {
      if (!differs || !marking) return words;
      const mark = document.createElement("mark");
      mark.textContent = words;
      return mark;
    }));
  }
}

function differences() {
  if (record?.kind !== "judge") return;
  marking = !marking;
  $("differences").setAttribute("aria-pressed", marking);
  fill();
}

async function choose(choice) {
  if (record?.kind !== "judge") return;
  await move("judge", {choice}, SAID[choice]);
  shownAt = performance.now();
}

async function renew(about) {           // keeps the pair for this page
  try {
    await call("save", {id: about.id, kind: about.kind});
    $("alert").hidden = true;
  } catch (error) {
    complain(error);
  }
}

function restForOthers(view) {          // every open pair needs another judge
  pause("You have judged all of your pairs",
        `${view.others} ${view.others === 1 ? "judgement is" : "judgements are"} left for other ` +
        "people. They can open this address in a browser of their own. The program ends with " +
        "Ctrl-C, and the same command continues.", "Look again", next);
}

// ----- keys: single characters, which a person can switch off

const PLAIN = {"1": () => choose("left"), "2": () => choose("right"), t: () => choose("tie"),
               s: () => acts.skip(), d: differences};

function plainKey(event) {              // true if the key press is dealt with
  if (!record || event.ctrlKey || event.metaKey || event.altKey) return false;
  const early = performance.now() - shownAt < SETTLE;
  if (record.kind !== "judge") {        // the key of a judgement, hit twice or held, is no text
    const stray = event.key.length === 1 && early || event.key === held;
    if (stray) event.preventDefault();
    return stray;
  }
  const action = $("plain-keys").checked && PLAIN[event.key.toLowerCase()];
  if (!action) return false;
  event.preventDefault();
  if (!early && !event.repeat && !moving) {
    held = event.key;
    action();
  }
  return true;
}
addEventListener("keyup", () => { held = ""; });

for (const kbd of document.querySelectorAll("kbd[data-plain]")) {
  kbd.textContent = kbd.dataset.plain;
  const button = kbd.closest("button");
  if (!button) continue;
  kbd.ariaHidden = "true";
  button.setAttribute("aria-keyshortcuts", kbd.dataset.plain);
}
$("plain-keys").checked = localStorage.plainKeys !== "off";
$("plain-keys").onchange = () => {
  localStorage.plainKeys = $("plain-keys").checked ? "on" : "off";
};
for (const choice of ["left", "right", "tie"]) {
  $(`choose-${choice}`).onclick = () => choose(choice);
}
$("skip-pair").onclick = () => acts.skip();
$("differences").onclick = differences;
