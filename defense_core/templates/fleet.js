"use strict";
(() => {
  const form = document.getElementById("filters");
  const rows = [...document.querySelectorAll("#versions tbody tr")];
  const status = document.getElementById("shown");
  const show = () => {
    const wanted = form.elements.words.value.trim().toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = wanted.every((word) => text.includes(word))
        && (!form.elements.model.value || row.dataset.model === form.elements.model.value)
        && (!form.elements.outcome.value || row.dataset.outcome === form.elements.outcome.value)
        && (!form.elements.served.checked || row.dataset.served === "yes")
        && (!form.elements.drifted.checked || row.dataset.drifted === "yes");
      row.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    status.textContent = `${shown} of ${rows.length} shown`;
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(show));
  form.hidden = false;
  show();
})();
