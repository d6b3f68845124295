"use strict";
(() => {
  const root = document.documentElement;
  const tip = document.getElementById("tip");

  // Theme: what was chosen here before, else the system's. Storage may be forbidden for a local file.
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("theme"); } catch { /* keep the system's */ }
  const show = (theme) => {
    root.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light" : "Dark";
  };
  const current = () => chosen ?? (system.matches ? "dark" : "light");
  show(current());
  system.addEventListener("change", () => show(current()));
  button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("theme", chosen); } catch { /* lasts until the page is closed */ }
    show(chosen);
  });

  const place = (x, y) => {
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, x + 14), window.innerWidth - box.width - 8);
    const above = y - box.height - 12;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : y + 18}px`;
  };
  const hide = () => { tip.hidden = true; };

  // Marks that carry their own text.
  for (const mark of document.querySelectorAll("[data-tip]")) {
    const tell = (x, y) => { tip.textContent = mark.dataset.tip; place(x, y); };
    mark.addEventListener("pointermove", (event) => tell(event.clientX, event.clientY));
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("focus", () => {
      const box = mark.getBoundingClientRect();
      tell(box.right - 14, box.top);
    });
    mark.addEventListener("blur", hide);
  }

  // Line charts: a cross-hair on the nearest step, by pointer or arrow keys.
  const number = (value, percent) =>
    percent ? `${(100 * value).toFixed(1)} %` : String(Number(value.toPrecision(4)));
  const nearest = (values, wanted) => {
    let best = 0;
    values.forEach((value, i) => { if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = i; });
    return best;
  };
  for (const chart of document.querySelectorAll("[data-line]")) {
    const data = JSON.parse(chart.dataset.line);
    const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cross.setAttribute("class", "cross");
    cross.setAttribute("y1", 12);
    cross.setAttribute("y2", chart.viewBox.baseVal.height - 40);
    cross.style.display = "none";
    chart.append(cross);
    let position = data.px.length - 1;
    const point = (i) => {
      position = i;
      cross.setAttribute("x1", data.px[i]);
      cross.setAttribute("x2", data.px[i]);
      cross.style.display = "";
      tip.replaceChildren();
      const head = document.createElement("b");
      head.textContent = `${data.xLabel} ${Math.round(data.x[i])}`;
      tip.append(head);
      for (const series of data.series) {
        const j = nearest(series.x, data.x[i]);
        const line = document.createElement("div");
        const range = series.low && series.low[j] !== series.high[j]
          ? ` [${number(series.low[j], data.percent)}, ${number(series.high[j], data.percent)}]` : "";
        line.textContent = `${series.label}: ${number(series.y[j], data.percent)}${range}`;
        tip.append(line);
      }
      const box = chart.getBoundingClientRect();
      return box.left + (data.px[i] / chart.viewBox.baseVal.width) * box.width;
    };
    const leave = () => { cross.style.display = "none"; hide(); };
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const wanted = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
      place(point(nearest(data.px, wanted)), event.clientY);
    });
    chart.addEventListener("pointerleave", leave);
    chart.addEventListener("blur", leave);
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const i = Math.min(Math.max(0, position + step), data.px.length - 1);
      place(point(i), chart.getBoundingClientRect().top + 40);
    });
  }

  // Tables as CSV; a cell's full value is in data-value.
  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const csv = (table) => [...table.rows].map((row) =>
    [...row.cells].map((cell) => quoted(cell.dataset.value ?? cell.textContent.trim())).join(",")).join("\n") + "\n";
  for (const download of document.querySelectorAll("[data-csv]")) {
    download.addEventListener("click", () => {
      const link = document.createElement("a");
      link.href = "data:text/csv;charset=utf-8," + encodeURIComponent(csv(document.getElementById(download.dataset.csv)));
      link.download = `${download.dataset.csv}.csv`;
      link.click();
    });
  }

  const play = document.getElementById("play");
  play?.addEventListener("click", () => {
    const videos = [...document.querySelectorAll("video")];
    const playing = videos.some((video) => !video.paused);
    for (const video of videos) playing ? video.pause() : video.play();
    play.textContent = playing ? "Play all" : "Pause all";
  });

  // On paper: light, and nothing folded away.
  window.addEventListener("beforeprint", () => {
    show("light");
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
  window.addEventListener("afterprint", () => show(current()));
})();
