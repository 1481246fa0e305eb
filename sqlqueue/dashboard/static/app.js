"use strict";
// What the pages do beyond their forms and links, all of which work without this.
(() => {
  const root = document.body.dataset.root;
  const live = document.getElementById("live");
  let isOn = true, source = null, timer = 0, tag = "", isLoading = false, again = false;

  // Live: fetch this page anew, and put in what has changed.

  const say = (word, on) => {
    if (!live) return;
    live.querySelector(".word").textContent = word;
    live.classList.toggle("on", on);
  };
  const isBusy = (part) => part.contains(document.activeElement) &&
    document.activeElement.matches("input:not([type=checkbox]), textarea, select") ||
    (getSelection().toString() && part.contains(getSelection().anchorNode));

  function swap(old, fresh) {
    const picked = new Set([...old.querySelectorAll("input:checked")].map((one) => one.value));
    const open = new Set([...old.querySelectorAll("details[open]")].map((one) => one.id || one.className));
    const at = old.querySelector(".at")?.dataset.id;
    const focused = old.contains(document.activeElement) ? document.activeElement : null;
    const place = focused && [...old.querySelectorAll("a, button, input, summary, pre")].indexOf(focused);
    const value = focused?.value, href = focused?.href;
    for (const one of fresh.querySelectorAll("input[type=checkbox]")) one.checked = picked.has(one.value);
    for (const one of fresh.querySelectorAll("details")) if (open.has(one.id || one.className)) one.open = true;
    for (const one of fresh.querySelectorAll(".job")) if (at && one.dataset.id === at) one.classList.add("at");
    old.replaceWith(fresh);
    if (focused) {
      const all = [...fresh.querySelectorAll("a, button, input, summary, pre")];
      (all.find((one) => (value && one.value === value) || (href && one.href === href)) || all[place])?.focus({ preventScroll: true });
    }
  }

  async function load() {
    if (isLoading) { again = true; return; }
    isLoading = true;
    try {
      const response = await fetch(location.href, { credentials: "same-origin", headers: { "X-Live": "1" } });
      if (response.ok) {
        const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
        for (const part of document.querySelectorAll("[data-live]")) {
          const other = part.id && fresh.getElementById(part.id);
          if (other && other.outerHTML !== part.outerHTML && !isBusy(part)) swap(part, document.adoptNode(other));
        }
      }
      say(response.ok ? "live" : "away", response.ok);
    } catch { say("away", false); }
    isLoading = false;
    if (again) { again = false; setTimeout(load, 1000); }
  }

  async function poll() {
    try {
      const response = await fetch(`${root}/snapshot`, { headers: tag ? { "If-None-Match": tag } : {} });
      const now = response.headers.get("ETag");
      if (response.status === 200 && now !== tag) { if (tag) load(); tag = now; }
      say(response.ok || response.status === 304 ? "live" : "away", response.ok || response.status === 304);
    } catch { say("away", false); }
    if (isOn && !document.hidden) timer = setTimeout(poll, 3000);
  }

  function start() {
    stop();
    const isAnswer = location.pathname.startsWith(`${root}/act/`);  // to a form: not to be asked for again
    if (!isOn || isAnswer || document.hidden || !document.querySelector("[data-live]")) return;
    let heard = false;
    source = new EventSource(`${root}/events`);
    source.onopen = () => say("live", true);
    source.addEventListener("changed", () => { heard = true; load(); });
    source.onerror = () => {
      if (!source || source.readyState === EventSource.CLOSED) { stop(); poll(); } else say("away", false);
    };
    // A proxy that keeps events back looks like silence: ask, if nothing came.
    timer = setTimeout(() => { if (!heard && source) { source.close(); source = null; poll(); } }, 4000);
  }

  // What a running job says changes no level: its page looks each second.
  setInterval(() => {
    if (isOn && !document.hidden && document.querySelector("[data-follow]")) load();
  }, 1000);

  function stop() {
    clearTimeout(timer);
    if (source) source.close();
    source = null;
  }
  const toggle = () => { isOn = !isOn; if (isOn) start(); else { stop(); say("still", false); } };
  document.addEventListener("visibilitychange", () => { if (document.hidden) stop(); else { load(); start(); } });
  window.addEventListener("pagehide", stop);
  start();

  // Lists

  const here = document.getElementById("all-here");
  here?.addEventListener("change", () => {
    for (const one of document.querySelectorAll("input[name=job]")) one.checked = here.checked;
  });
  for (const button of document.querySelectorAll(".copier")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const text = (button.closest("p") || button).nextElementSibling.textContent;
      await navigator.clipboard?.writeText(text);
      button.textContent = "Copied";
    });
  }

  // Keys

  const pages = { o: "/", j: "/jobs", f: "/failures", q: "/queues", w: "/workers", t: "/tasks", s: "/schedules", y: "/system" };
  let isGoing = false;
  function move(step) {
    const rows = [...document.querySelectorAll("tbody.job")];
    const at = rows.findIndex((row) => row.classList.contains("at"));
    const next = rows[Math.min(Math.max(at + step, 0), rows.length - 1)];
    if (!next) return;
    rows[at]?.classList.remove("at");
    next.classList.add("at");
    next.scrollIntoView({ block: "nearest" });
    (next.querySelector("input") || next.querySelector("a")).focus({ preventScroll: true });
  }
  const press = (verb) => {
    if (document.querySelector("input[name=job]:checked")) document.querySelector(`button[data-verb=${verb}]`)?.click();
    else document.querySelector(`.headline form[action$="/act/${verb}"] button`)?.click();
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input:not([type=checkbox]), textarea, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const key = event.key;
    if (isGoing) { isGoing = false; if (pages[key]) location.href = root + pages[key]; return; }
    const does = {
      "/": () => document.getElementById("q").focus(),
      g: () => { isGoing = true; },
      j: () => move(1), k: () => move(-1),
      x: () => { const box = document.querySelector(".at input[name=job]"); if (box) box.checked = !box.checked; },
      r: () => press("retry"), c: () => press("cancel"),
      ".": () => document.getElementById("compact")?.click(),
      l: toggle,
      "?": () => document.getElementById("keys").showModal(),
    }[key];
    if (does) { event.preventDefault(); does(); }
  });
})();
