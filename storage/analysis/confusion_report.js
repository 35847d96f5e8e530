"use strict";
const PAGE_ITEMS = 10;
const faces = JSON.parse(document.getElementById("faces").textContent);
const lists = [...document.querySelectorAll("section.list")];
const items = [...document.querySelectorAll("section.list li")];
const tabs = [...document.querySelectorAll("nav button")];
const filter = document.getElementById("filter");
const position = document.getElementById("position");
const [previous, next] = ["previous", "next"].map((id) => document.getElementById(id));
const firstShown = lists.map(() => 0);
let current = 0;

function show() {
  tabs.forEach((tab, index) => tab.setAttribute("aria-current", String(index === current)));
  lists.forEach((section, index) => { section.hidden = index !== current; });
  const query = filter.value.trim().toLowerCase();
  const found = [...lists[current].querySelectorAll("li")].filter(
    (item) => item.dataset.search.toLowerCase().includes(query));
  const last = Math.max(0, PAGE_ITEMS * (Math.ceil(found.length / PAGE_ITEMS) - 1));
  const first = firstShown[current] = Math.min(Math.max(0, firstShown[current]), last);
  const visible = new Set(found.slice(first, first + PAGE_ITEMS));
  for (const item of items) {
    item.hidden = !visible.has(item);
    for (const image of item.querySelectorAll("img")) {
      // Only visible faces are decoded.
      if (visible.has(item)) image.src = "data:image/jpeg;base64," + faces[image.dataset.face];
      else image.removeAttribute("src");
    }
  }
  lists[current].querySelector(".empty").hidden = found.length > 0;
  position.textContent = found.length
    ? `${first + 1}\u2013${Math.min(first + PAGE_ITEMS, found.length)} of ${found.length}` : "none";
  previous.disabled = first === 0;
  next.disabled = first >= last;
}

function turn(pages) {
  firstShown[current] += pages * PAGE_ITEMS;
  show();
  document.querySelector("nav").scrollIntoView();
}

tabs.forEach((tab, index) => tab.addEventListener("click", () => { current = index; show(); }));
previous.addEventListener("click", () => turn(-1));
next.addEventListener("click", () => turn(1));
filter.addEventListener("input", () => { firstShown.fill(0); show(); });
document.addEventListener("keydown", (event) => {
  const turns = { ArrowLeft: -1, ArrowRight: 1 };
  const plain = !(event.altKey || event.ctrlKey || event.metaKey || event.shiftKey);
  if (plain && event.target !== filter && event.key in turns) {
    event.preventDefault();
    turn(turns[event.key]);
  }
});
for (const element of document.querySelectorAll(".scripted")) element.hidden = false;
show();
