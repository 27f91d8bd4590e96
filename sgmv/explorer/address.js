// The address of the page holds all that is shown, so that it can be kept or sent.
"use strict";

// Controls in one order, so that addresses can be compared; nothing that follows from the rest.
function address(values) {
  const kept = {};
  for (const name of [...CHOICES, ...COUNTS]) kept[name] = values[name];
  if (values.popularity) kept.n = values.n ?? values.ids.length;
  else {
    delete kept.n;
    kept.ids = typeof values.ids === "string" ? values.ids : written(values.ids);
  }
  if (values.moment) kept.moment = values.moment;
  return `#${new URLSearchParams(kept)}`;
}

let saving = null; // the timer after which a moment is kept: a browser refuses hundreds at once

let saved = null; // the address that was written last

// Not over an address that the browser has gone to and the page has yet to read.
function save() {
  clearTimeout(saving);
  if (saved !== null && location.hash !== saved) return;
  saved = address({ ...state, moment });
  history.replaceState(null, "", saved);
}

function save_soon() {
  clearTimeout(saving);
  saving = setTimeout(save, 250);
}

// Whatever an address leaves out is as the page began.
function read_address() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  controls_write({ ...FIVE_ROWS, ...DATA.start, ...given });
  saved = location.hash;
  update(Math.trunc(Number(given.moment)) || 0, true);
}
