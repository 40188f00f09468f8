"use strict";
// Each decoding gets a slider over its denoiser calls: what was open before a call, what it chose.
for (const view of document.querySelectorAll(".decoding")) {
  const steps = view.querySelector(".steps");
  const slider = steps.querySelector("input");
  const output = steps.querySelector("output");
  const calls = Number(view.dataset.calls);
  const block = Number(view.dataset.block);
  const tiles = Array.from(view.querySelectorAll(".tile"), (element) => ({
    element,
    at: Number(element.dataset.at), // the call that chose it; 0: given; above calls: never
    size: Number(element.dataset.size),
    position: Number(element.dataset.position),
    chance: element.dataset.chance === "" ? null : Number(element.dataset.chance),
  }));
  const blockOf = (tile) => (block > 0 ? Math.floor(tile.position / block) : 0);
  const percent = (value) => Math.round(100 * value) + "%";

  function show() {
    const call = Number(slider.value);
    const masked = tiles.filter((tile) => tile.at >= Math.max(1, call));
    const chosen = tiles.filter((tile) => call > 0 && tile.at === call);
    const active = Math.min(...masked.map(blockOf));
    let open = 0;
    let waiting = 0;
    for (const tile of tiles) {
      const before = tile.at >= Math.max(1, call);
      const inBlock = blockOf(tile) === active;
      if (before && (inBlock || tile.at === call)) open += tile.size;
      else if (before) waiting += tile.size;
      const after = call < calls && tile.at > call;
      tile.element.classList.toggle("open", after && inBlock);
      tile.element.classList.toggle("later", after && !inBlock);
      tile.element.classList.toggle("now", call < calls && call > 0 && tile.at === call);
      tile.element.setAttribute("aria-hidden", String(after));
    }
    const place = call + " of " + calls;
    slider.setAttribute("aria-valuetext", "call " + place);
    let text = "All " + calls + " calls. Move the slider to see one of them.";
    if (call === 0) text = "Before the first call: " + (open + waiting) + " positions are masked.";
    else if (call < calls || slider.dataset.moved) {
      text = "Call " + place + ": chose " + chosen.length + " of " + open + " open positions";
      const chances = chosen.map((tile) => tile.chance).filter((chance) => chance !== null);
      if (chances.length) {
        const low = percent(Math.min(...chances));
        const high = percent(Math.max(...chances));
        text += ", probability " + (low === high ? low : low + " to " + high);
      }
      if (waiting) text += "; " + waiting + " wait for their block";
      text += ".";
    }
    output.textContent = text;
  }

  slider.addEventListener("input", () => {
    slider.dataset.moved = "1";
    show();
  });
  steps.hidden = false;
  show();
}
