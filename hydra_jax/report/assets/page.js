"use strict";
// Draws every figure of the report from the data in the page. Nothing is fetched.

const data = JSON.parse(document.getElementById("data").textContent);

// Arrays travel as base64 of little-endian numbers.
function numbers(packed, kind) {
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  return new kind(bytes.buffer);
}
const A = data.ablated.length, C = data.components.length, P = data.prompts.text.length;
const effects = {};
for (const [name, packed] of Object.entries(data.effects)) effects[name] = numbers(packed, Float32Array);
const contribution = numbers(data.delta_unembed, Float32Array);
const moved = numbers(data.compensation, Int16Array), scale = numbers(data.scale, Float32Array);
const begins = [0];
for (const a of data.ablated) begins.push(begins[begins.length - 1] + C - a.first);
const effect = (name, prompt, a) => effects[name][prompt * A + a];

// A prompt's compensation by component, 0 upstream of what is ablated.
function compensation(prompt, a) {
  const out = new Array(C).fill(0), first = data.ablated[a].first, row = prompt * begins[A] + begins[a];
  for (let c = first; c < C; c++) out[c] = moved[row + c - first] * scale[prompt * A + a];
  return out;
}

const state = { ablated: data.start.ablated, prompt: data.start.prompt };
const wide = () => document.documentElement.clientWidth >= 760;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const faded = (name, alpha) => {
  const n = parseInt(colour(name).slice(1), 16);
  return `rgba(${n >> 16}, ${(n >> 8) & 255}, ${n & 255}, ${alpha})`;
};
// Plotly reads markup in texts: a prompt's own < and & are only characters.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const wrap = (text, width = 70) => {
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines[lines.length - 1].length + word.length > width) lines.push("");
    lines[lines.length - 1] += (lines[lines.length - 1] ? " " : "") + word.slice(0, 200);
  }
  return lines.slice(0, 6).map(plain).join("<br>");
};
const hovers = data.prompts.text.map((text, i) => `“${wrap(text)}” → “${plain(data.prompts.target[i].trim())}”`);
// Blue erodes, red repairs.
const diverging = [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#b2182b"]];
const siteName = { attn: "attention", mlp: "MLP" };
const range = (n) => Array.from({ length: n }, (_, i) => i);

function axis(title, more = {}) {
  return { title: { text: title, standoff: 6 }, gridcolor: colour("line"), zerolinecolor: colour("grey"), color: colour("ink"),
    automargin: true, ...more };
}

// Panels side by side on a wide screen, one below the other on a narrow one.
function panels(titles, xs, ys, height = 380, more = {}) {
  const n = titles.length, across = wide(), gap = across ? 0.07 : 0.13 / Math.max(1, n - 1) + 0.04;
  const size = (1 - gap * (n - 1)) / n;
  const layout = { ...base(across ? height : (height - 40) * n), annotations: [], ...more };
  titles.forEach((title, i) => {
    const id = i ? i + 1 : "", from = i * (size + gap), down = 1 - from;
    layout["xaxis" + id] = axis(xs[i] ?? xs[0], across ? { domain: [from, from + size], anchor: "y" + id }
      : { domain: [0, 1], anchor: "y" + id });
    layout["yaxis" + id] = axis(across && i && ys.length === 1 ? "" : ys[i] ?? ys[0],
      { anchor: "x" + id, ...(across ? {} : { domain: [Math.max(0, down - size), down] }) });
    layout.annotations.push({ text: `<b>${title}</b>`, showarrow: false, xref: `x${id} domain`, yref: `y${id} domain`,
      x: 0, y: 1, yshift: 18, xanchor: "left", font: { size: 13, color: colour("ink") } });
  });
  return layout;
}

function base(height) {
  return { height, margin: { l: 56, r: 16, t: 40, b: 52 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: colour("ink") }, hovermode: "closest",
    hoverlabel: { align: "left", bgcolor: colour("panel"), font: { color: colour("ink") } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("grey"), activecolor: colour("ink") },
    legend: { orientation: "h", y: -0.16, yanchor: "top", x: 0 }, dragmode: wide() ? "zoom" : false };
}

function line(name, x, y, shade, panel = 0, more = {}) {
  const id = panel ? panel + 1 : "";
  return { type: "scatter", mode: "lines+markers", name, x, y, xaxis: "x" + id, yaxis: "y" + id,
    line: { color: colour(shade), width: 1.6 }, marker: { size: 5, color: colour(shade) }, legendgroup: name, ...more };
}

function band(x, low, high, shade, panel, group) {
  const id = panel ? panel + 1 : "", known = range(x.length).filter((i) => low[i] !== null && high[i] !== null);
  [x, low, high] = [x, low, high].map((values) => known.map((i) => values[i]));
  return { type: "scatter", mode: "lines", x: [...x, ...[...x].reverse()], y: [...high, ...[...low].reverse()], fill: "toself",
    fillcolor: faded(shade, 0.18), line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: group,
    xaxis: "x" + id, yaxis: "y" + id };
}

// A statistic by layer with its interval: table columns are arrays, indices say which rows.
function statistic(table, indices, name, label, shade, panel, more = {}) {
  const column = (key) => indices.map((i) => table[key][i]);
  const x = column("layer"), low = column(name + "_low"), high = column(name + "_high");
  return [
    band(x, low, high, shade, panel, label),
    line(label, x, column(name), shade, panel, {
      customdata: indices.map((i, k) => [table.name ? table.name[i] : "", low[k], high[k]]),
      hovertemplate: `%{customdata[0]}<br>${label}: %{y:.3f} (%{customdata[1]:.3f} to %{customdata[2]:.3f})<extra></extra>`,
      ...more }),
  ];
}

const bySite = (table) => data.sites.map((site) => range(table.site.length).filter((i) => table.site[i] === site));
const chosenName = () => data.ablated[state.ablated].name;
const marker = (axisId) => ({ type: "line", xref: "x" + axisId, yref: `y${axisId} domain`, x0: data.ablated[state.ablated].layer,
  x1: data.ablated[state.ablated].layer, y0: 0, y1: 1, line: { color: colour("grey"), width: 1, dash: "dot" } });
const markers = () => data.sites.map((site, i) => [site, i]).filter(([site]) => site === data.ablated[state.ablated].site)
  .map(([, i]) => marker(i ? i + 1 : ""));

const figures = {
  layers: {
    title: "What a layer contributes, and what its ablation costs", shown: !data.by_head && data.sites.length > 0, on: ["ablated"],
    caption: "Median over prompts, with quartiles. Where red is below blue, layers downstream repair part of the loss; above," +
      " they add to it. (Grey is all of a layer's contribution; what replaces it keeps some of that.) Click a layer to choose it.",
    draw() {
      const traces = [];
      data.sites.forEach((site, panel) => {
        for (const [name, label, shade] of [["delta_unembed", "contributes (delta_unembed)", "grey"],
          ["direct_effect", "is lost directly when ablated (direct effect)", "blue"], ["total_effect", "is lost in the end (total effect)", "red"]]) {
          const q = data.quartiles[site][name];
          traces.push(band(data.quartiles[site].layer, q[0], q[2], shade, panel, label));
          traces.push(line(label, data.quartiles[site].layer, q[1], shade, panel, { showlegend: panel === 0,
            customdata: data.quartiles[site].ablated, meta: "ablated",
            hovertemplate: `${siteName[site]} %{x}<br>${label}: %{y:.3f}<extra></extra>` }));
        }
      });
      return [traces, { ...panels(data.sites.map((s) => siteName[s] + " ablated"), ["layer"], ["logits"]), shapes: markers() }];
    },
  },
  against: {
    title: "Direct against total effect", shown: true, on: ["ablated", "prompt"],
    caption: "One point per prompt. Below the diagonal the loss is repaired downstream, above it is made worse. Faint: other layers" +
      " (some points, drawn at random); strong: the chosen component; the star: the chosen prompt. Click a point to choose it.",
    draw() {
      const points = data.scatter.map((k) => [Math.floor(k / A), k % A]), a = state.ablated;
      const own = range(P), hover = "<br>direct %{x:.3f}, total %{y:.3f}<extra></extra>";
      const every = [...points, ...own.map((p) => [p, a])];
      const all = every.flatMap(([p, i]) => [effect("direct_effect", p, i), effect("total_effect", p, i)]);
      const low = all.reduce((x, y) => Math.min(x, y), 0), high = all.reduce((x, y) => Math.max(x, y), 0);
      const traces = [
        { type: "scatter", mode: "lines", x: [low, high], y: [low, high], line: { color: colour("grey"), dash: "dash", width: 1 },
          hoverinfo: "skip", showlegend: false },
        { type: "scatter", mode: "markers", name: "other layers", x: points.map(([p, i]) => effect("direct_effect", p, i)),
          y: points.map(([p, i]) => effect("total_effect", p, i)), meta: "both", customdata: points,
          text: points.map(([p, i]) => `${data.ablated[i].name}: ${hovers[p]}`), hovertemplate: "%{text}" + hover,
          marker: { size: 4, opacity: 0.45, color: points.map(([, i]) => data.ablated[i].layer), colorscale: "Viridis",
            colorbar: { title: { text: "layer" }, thickness: 10, len: 0.7 } } },
        { type: "scatter", mode: "markers", name: chosenName(), x: own.map((p) => effect("direct_effect", p, a)),
          y: own.map((p) => effect("total_effect", p, a)), meta: "both", customdata: own.map((p) => [p, a]),
          text: own.map((p) => `${chosenName()}: ${hovers[p]}`), hovertemplate: "%{text}" + hover,
          marker: { size: 6, color: colour("red"), opacity: 0.75 } },
        { type: "scatter", mode: "markers", name: "the chosen prompt", x: [effect("direct_effect", state.prompt, a)],
          y: [effect("total_effect", state.prompt, a)], hoverinfo: "skip",
          marker: { size: 14, symbol: "star", color: colour("ink") } },
      ];
      const layout = { ...base(wide() ? 560 : 460), xaxis: axis("direct effect (logits)"), yaxis: axis("total effect (logits)") };
      const corner = (text, x, y, xanchor, yanchor) => ({ text, x, y, xref: "paper", yref: "paper", xanchor, yanchor,
        showarrow: false, font: { color: colour("soft") } });
      layout.annotations = [corner("downstream repair", 0.98, 0.02, "right", "bottom"),
        corner("downstream breakage", 0.02, 0.98, "left", "top")];
      return [traces, layout];
    },
  },
  agreement: {
    title: "How well direct and total effect agree", shown: !data.by_head && data.sites.length > 0 && P > 3, on: ["ablated"],
    caption: "R² over prompts between what a layer contributes and what its ablation costs, and the share of prompts in which the" +
      " loss is smaller than the direct effect. Bands are 95 % intervals.",
    draw() {
      const traces = bySite(data.summary).flatMap((indices, panel) => [
        ...statistic(data.summary, indices, "total_r2", "R²", "ink", panel, { showlegend: !panel, meta: "ablated", ids: indices.map(String) }),
        ...statistic(data.summary, indices, "share_direct_above_total", "share of prompts repaired", "green", panel, { showlegend: !panel }),
      ]);
      return [traces, { ...panels(data.sites.map((s) => siteName[s] + " ablated"), ["layer"], [""], 320), shapes: markers() }];
    },
  },
  prompt: {
    title: "One prompt, before and after", shown: true, on: ["ablated", "prompt"],
    caption: "What every component contributes to the target's logit, in the clean run and with the chosen component ablated (mean" +
      " over replacements; faint: single replacements, where they were kept).",
    draw() {
      const p = state.prompt, a = state.ablated, change = compensation(p, a), own = data.ablated[a];
      const clean = range(C).map((c) => contribution[p * C + c]);
      const after = clean.map((value, c) => value + change[c]);
      // Of several ablated components the direct effect is known of all together alone.
      if (own.components.length > 1) for (const c of own.components) after[c] = null;
      else if (own.head < 0) after[own.components[0]] -= effect("direct_effect", p, a);
      else after[own.components[0]] += change[own.components[0]] - effect("direct_effect", p, a);
      const traces = [];
      ["attn", "mlp"].forEach((site, panel) => {
        const indices = range(C).filter((c) => data.components[c].site === site);
        const x = indices.map((c) => data.components[c].layer), names = indices.map((c) => data.components[c].name);
        for (const example of data.examples) {
          if (example.prompt !== p || example.ablated !== a) continue;
          for (const run of example.runs) traces.push(line("replacements", x, indices.map((c) => run[c]), "red", panel,
            { mode: "lines", opacity: 0.25, line: { width: 1, color: colour("red") }, hoverinfo: "skip", showlegend: false }));
        }
        traces.push(line("clean run", x, indices.map((c) => clean[c]), "blue", panel, { showlegend: !panel, text: names,
          hovertemplate: "%{text}, clean: %{y:.3f}<extra></extra>" }));
        traces.push(line("ablated run", x, indices.map((c) => after[c]), "red", panel, { showlegend: !panel, text: names,
          customdata: indices.map((c) => change[c]),
          hovertemplate: "%{text}, ablated: %{y:.3f}<br>compensation %{customdata:+.3f}<extra></extra>" }));
      });
      const value = (name) => effect(name, p, a).toFixed(2);
      document.getElementById("note-prompt").textContent = `“${data.prompts.text[p]}” → “${data.prompts.target[p].trim()}”` +
        ` (p = ${data.prompts.probability[p].toFixed(2)}). Ablating ${own.name} takes ${value("direct_effect")} logits away directly;` +
        ` in the end the logit ${effect("total_effect", p, a) < 0 ? "rises" : "falls"} by ${value("total_effect").replace("-", "")}. Restored: by attention ${value("attn_compensation")}, by MLPs` +
        ` ${value("mlp_compensation")}, by the final norm ${value("norm_compensation")}.`;
      return [traces, { ...panels(["attention", "MLP"], ["layer"], ["contribution (logits)"]), shapes: own.components.length > 1 ? [] : own.site === "attn" ? [marker("")] : [marker(2)] }];
    },
  },
  regress: {
    title: "Compensation against direct effect", shown: P > 3, on: ["ablated", "prompt"],
    caption: "One point per prompt, for the chosen component, with the regression: a slope of 1 would restore everything.",
    draw() {
      const a = state.ablated, own = range(P);
      const all = (p) => effect("attn_compensation", p, a) + effect("mlp_compensation", p, a) + effect("norm_compensation", p, a);
      const x = own.map((p) => effect("direct_effect", p, a)), y = own.map(all);
      const slope = data.summary.slope[a], intercept = data.summary.intercept[a];
      const ends = [x.reduce((u, v) => Math.min(u, v)), x.reduce((u, v) => Math.max(u, v))];
      const number = (name) => data.summary[name][a]?.toFixed(2);
      const fit = (name) => (number(name) ?? "unknown") + (number(name + "_low") ? ` (${number(name + "_low")} to ${number(name + "_high")})` : "");
      const traces = [{ type: "scatter", mode: "markers", name: chosenName(), x, y, meta: "both", customdata: own.map((p) => [p, a]),
        text: own.map((p) => hovers[p]), hovertemplate: "%{text}<br>direct %{x:.3f}, compensation %{y:.3f}<extra></extra>",
        marker: { size: 6, color: colour("blue"), opacity: 0.6 } },
      { type: "scatter", mode: "markers", name: "the chosen prompt", x: [x[state.prompt]], y: [y[state.prompt]], hoverinfo: "skip",
        marker: { size: 14, symbol: "star", color: colour("ink") } }];
      if (slope !== null) traces.push({ type: "scatter", mode: "lines", name: `slope ${fit("slope")}, R² ${fit("r2")}`, x: ends,
        y: ends.map((u) => intercept + slope * u), line: { color: colour("red"), width: 2 }, hoverinfo: "skip" });
      return [traces, { ...base(430), xaxis: axis("direct effect (logits)"), yaxis: axis("compensation (logits)") }];
    },
  },
  panels: {
    title: "The same, layer by layer", shown: !data.by_head && data.sites.length > 0 && P > 3, on: [],
    caption: "Compensation against direct effect of every ablated layer, attention blue and MLP orange: some prompts drawn at random," +
      " and the regression over all. Click a panel's points to choose the component.",
    draw() {
      const singles = range(A).filter((a) => data.ablated[a].components.length === 1);
      const layers = [...new Set(singles.map((a) => data.ablated[a].layer))], across = wide() ? 6 : 3, rows = Math.ceil(layers.length / across);
      const layout = { ...base(135 * rows + 50), showlegend: false, annotations: [] }, traces = [];
      const some = data.some;
      layers.forEach((layer, n) => {
        const id = n ? n + 1 : "", column = n % across, row = Math.floor(n / across), w = 1 / across, h = 1 / rows;
        const small = { tickfont: { size: 8 }, nticks: 4, automargin: false, title: "" };
        layout["xaxis" + id] = { ...axis("", small), domain: [column * w + 0.02, (column + 1) * w - 0.005], anchor: "y" + id };
        layout["yaxis" + id] = { ...axis("", small), domain: [1 - (row + 1) * h + 0.25 * h, 1 - row * h - 0.08 * h], anchor: "x" + id };
        layout.annotations.push({ text: "layer " + layer, showarrow: false, xref: `x${id} domain`, yref: `y${id} domain`, x: 0, y: 1,
          yshift: 10, xanchor: "left", font: { size: 10 } });
        singles.filter((a) => data.ablated[a].layer === layer).forEach((a) => {
          const shade = data.ablated[a].site === "attn" ? "blue" : "orange", x = some.map((p) => effect("direct_effect", p, a));
          const y = some.map((p) => effect("attn_compensation", p, a) + effect("mlp_compensation", p, a) + effect("norm_compensation", p, a));
          traces.push({ type: "scatter", mode: "markers", x, y, xaxis: "x" + id, yaxis: "y" + id, meta: "both",
            customdata: some.map((p) => [p, a]), text: some.map((p) => `${data.ablated[a].name}: ${hovers[p]}`),
            hovertemplate: "%{text}<br>direct %{x:.3f}, compensation %{y:.3f}<extra></extra>",
            marker: { size: 3, color: colour(shade), opacity: 0.5 } });
          const slope = data.summary.slope[a], ends = [Math.min(...x), Math.max(...x)];
          if (slope !== null) traces.push({ type: "scatter", mode: "lines", x: ends, y: ends.map((u) => data.summary.intercept[a] + slope * u),
            xaxis: "x" + id, yaxis: "y" + id, line: { color: colour(shade), width: 1.6 }, hoverinfo: "skip" });
        });
      });
      return [traces, layout];
    },
  },
  regression: {
    title: "Slope and R² by layer", shown: !data.by_head && data.sites.length > 0 && P > 3, on: ["ablated"],
    caption: "Regression of compensation on direct effect over prompts: all of it, and what downstream attention, downstream MLPs and" +
      " the final norm do. Bands are 95 % intervals.",
    draw() {
      const parts = [["", "all of it", "ink"], ["attn_", "downstream attention", "blue"], ["mlp_", "downstream MLPs", "orange"],
        ["norm_", "final norm", "green"]];
      const traces = [], titles = [], sites = bySite(data.summary);
      let panel = 0;
      for (const what of ["slope", "r2"]) sites.forEach((indices, s) => {
        for (const [part, label, shade] of parts) traces.push(...statistic(data.summary, indices, part + what, label, shade, panel, { showlegend: !panel }));
        titles.push(`${what === "r2" ? "R²" : "slope"}, ${siteName[data.sites[s]]} ablated`);
        panel++;
      });
      const layout = grid(titles, data.sites.length);
      data.sites.forEach((_, s) => { layout["yaxis" + (s ? s + 1 : "")].range = data.slope_range; });
      return [traces, layout];
    },
  },
  matrix: {
    title: "Who responds to whose ablation", shown: true, on: ["ablated"],
    caption: "Mean change of a component's contribution (columns) when another is ablated (rows): red repairs, blue erodes. Direct" +
      " edges: where it alone sees the edit; passed on: the rest, what changes of others in between did. Click a row to choose it.",
    draw() {
      const titles = data.matrices.map((m) => m.title), n = titles.length;
      const traces = data.matrices.map((m, i) => ({ type: "heatmap", z: m.z, x: data.components.map((c) => c.name), y: data.ablated.map((a) => a.name),
        xaxis: "x" + (i ? i + 1 : ""), yaxis: "y" + (i ? i + 1 : ""), zmin: -data.reach, zmax: data.reach, colorscale: diverging,
        showscale: i === n - 1, colorbar: { title: { text: "logits" }, thickness: 10 }, meta: "row",
        hovertemplate: "%{y} ablated, %{x} responds:<br>%{z:+.4f} logits<extra></extra>" }));
      const layout = panels(titles, ["responding component"], ["ablated component"], 520);
      range(n).forEach((i) => {
        layout["yaxis" + (i ? i + 1 : "")].autorange = "reversed";
        layout["yaxis" + (i ? i + 1 : "")].showticklabels = !(wide() && i);
        layout["xaxis" + (i ? i + 1 : "")].tickfont = layout["yaxis" + (i ? i + 1 : "")].tickfont = { size: 9 };
      });
      layout.shapes = range(n).map((i) => ({ type: "rect", xref: `x${i ? i + 1 : ""} domain`, yref: "y" + (i ? i + 1 : ""), x0: 0, x1: 1,
        y0: state.ablated - 0.5, y1: state.ablated + 0.5, line: { color: colour("ink"), width: 1 } }));
      return [traces, layout];
    },
  },
  erasure: {
    title: "Erasure", shown: P > 3, on: [],
    caption: "What each MLP contributes, clean and with the strongest attention layers ablated: below zero it pushes the target down;" +
      " a change above zero means that it pushes down less once there is less to erase. Bands are 95 % intervals.",
    draw() {
      const table = data.erasure, runs = [...new Set(table.ablated)], shades = ["ink", "red", "orange", "green"], traces = [];
      runs.forEach((run, r) => {
        const indices = range(table.layer.length).filter((i) => table.ablated[i] === run), label = run ? run + " ablated" : "clean run";
        const named = { ...table, name: table.layer.map((layer) => "MLP " + layer) };
        traces.push(...statistic(named, indices, "delta_unembed", label, shades[r % 4], 0));
        if (run) traces.push(...statistic(named, indices, "change", label, shades[r % 4], 1, { showlegend: false }));
      });
      return [traces, panels(["contribution", "change under ablation"], ["MLP layer"], ["logits"], 360)];
    },
  },
  kinds: {
    title: "Kinds of ablation side by side", shown: data.kinds.length > 1 && data.kinds_sites.length > 0, on: [],
    caption: `The ${data.kinds_prompts} prompts that all sweeps have, with the write replaced by another prompt's (resample), by the` +
      " mean over prompts, by zero, or by noise. Means over prompts.",
    draw() {
      const shades = { resample: "ink", mean: "blue", zero: "red", noise: "orange" }, traces = [], titles = [];
      let panel = 0;
      for (const [what, title] of [["direct_effect", "direct effect"], ["total_effect", "total effect"], ["compensation", "compensation"]]) {
        data.kinds_sites.forEach((site) => {
          for (const { kind, table } of data.kinds) traces.push(...statistic(table, range(table.site.length).filter((i) => table.site[i] === site),
            what, kind, shades[kind], panel, { showlegend: !panel }));
          titles.push(`${title}, ${siteName[site]}`);
          panel++;
        });
      }
      return [traces, grid(titles, data.kinds_sites.length)];
    },
  },
  heads: {
    title: "Attention heads", shown: data.heads !== null, on: [],
    caption: "Heads ablated one by one: the strongest, with 95 % intervals, and the mean direct effect and repair of every head.",
    draw() {
      const t = data.heads, own = range(t.name.length).filter((i) => t.head[i] >= 0), order = [...own].sort((i, j) => t.direct_effect[j] - t.direct_effect[i]).slice(0, 20).reverse();
      const bars = [["direct_effect", "direct effect", "blue"], ["total_effect", "total effect", "red"]].map(([name, label, shade]) => ({
        type: "bar", orientation: "h", name: label, y: order.map((i) => t.name[i]), x: order.map((i) => t[name][i]), marker: { color: colour(shade) },
        error_x: { type: "data", symmetric: false, array: order.map((i) => t[name + "_high"][i] - t[name][i]),
          arrayminus: order.map((i) => t[name][i] - t[name + "_low"][i]), thickness: 1, width: 2 },
        hovertemplate: `%{y}: ${label} %{x:.3f}<extra></extra>` }));
      const layers = [...new Set(own.map((i) => t.layer[i]))], H = own.reduce((most, i) => Math.max(most, t.head[i] + 1), 0);
      const z = (of) => layers.map((layer) => range(H).map((h) => {
        const i = own.find((k) => t.layer[k] === layer && t.head[k] === h);
        return i === undefined ? null : of(i);
      }));
      const map = (title, of, panel) => ({ type: "heatmap", z: z(of), x: range(H), y: layers, xaxis: "x" + panel, yaxis: "y" + panel,
        zmin: -data.heads_reach, zmax: data.heads_reach, showscale: panel === 3, colorbar: { thickness: 10, title: { text: "logits" } },
        colorscale: diverging,
        hovertemplate: `layer %{y} head %{x}: ${title} %{z:+.3f}<extra></extra>` });
      const traces = [...bars, map("direct effect", (i) => t.direct_effect[i], 2), map("repaired", (i) => t.direct_effect[i] - t.total_effect[i], 3)];
      const layout = panels(["the strongest", "direct effect", "repaired: direct less total"], ["logits", "head", "head"], ["", "layer", ""], 560);
      layout.barmode = "group";
      layout.yaxis.tickfont = { size: 9 };
      return [traces, layout];
    },
  },
  motifs: {
    title: "The two motifs in their smallest form", shown: true, on: [],
    caption: "y = x + f(x, u), x = u = 1 in the clean run. Where f erases x, ablating x costs nothing in the end; where f repairs x, f" +
      " adds u whenever x is not u, whatever x is set to.",
    draw() {
      const traces = [];
      data.motifs.forEach((motif, panel) => {
        for (const [name, label, shade, dash] of [["direct", "direct effect", "blue", "solid"], ["total", "total effect", "red", "solid"],
          ["compensation", "compensation by f", "green", "dash"]]) traces.push(line(label, data.motif_values, motif[name], shade, panel,
          { mode: "lines", line: { color: colour(shade), dash }, showlegend: !panel, hovertemplate: `x set to %{x:.2f}<br>${label}: %{y:.2f}<extra></extra>` }));
      });
      return [traces, panels(data.motifs.map((m) => m.title), ["what x is set to"], ["effect on y"], 300)];
    },
  },
};

// Rows of panels, `across` in each on a wide screen.
function grid(titles, across) {
  const columns = wide() ? across : 1, rows = Math.ceil(titles.length / columns), layout = { ...base(260 * rows + 60), annotations: [] };
  const gapX = columns > 1 ? 0.07 : 0, gapY = 0.3 / rows, w = (1 - gapX * (columns - 1)) / columns, h = (1 - gapY * (rows - 1)) / rows;
  titles.forEach((title, i) => {
    const id = i ? i + 1 : "", column = i % columns, row = Math.floor(i / columns), top = 1 - row * (h + gapY);
    layout["xaxis" + id] = axis("layer", { domain: [column * (w + gapX), column * (w + gapX) + w], anchor: "y" + id });
    layout["yaxis" + id] = axis("", { domain: [Math.max(0, top - h), top], anchor: "x" + id });
    layout.annotations.push({ text: `<b>${title}</b>`, showarrow: false, xref: `x${id} domain`, yref: `y${id} domain`, x: 0, y: 1, yshift: 18,
      xanchor: "left", font: { size: 13 } });
  });
  layout.legend.y = -0.08;
  return layout;
}

const settings = () => ({ responsive: true, displaylogo: false, displayModeBar: wide() ? "hover" : false,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] });  // none that sends data anywhere
const drawn = new Set();

function draw(id) {
  stale.delete(id);
  const [traces, layout] = figures[id].draw();
  Plotly.react("plot-" + id, traces, layout, settings());
  if (!drawn.has(id)) {
    drawn.add(id);
    document.getElementById("plot-" + id).on("plotly_click", ({ points: [point] }) => choose(point));
  }
}

function choose(point) {
  const how = point.data.meta, custom = point.customdata;
  if (how === "ablated") update({ ablated: Array.isArray(custom) ? Number(point.id) : custom });
  if (how === "both") update({ prompt: custom[0], ablated: custom[1] });
  if (how === "row") update({ ablated: data.ablated.findIndex((a) => a.name === point.y) });
}

const selects = { ablated: document.getElementById("ablated"), prompt: document.getElementById("prompt") };
const search = document.getElementById("search"), status = document.getElementById("status");

function update(change) {
  Object.assign(state, change);
  if (!selects.prompt.querySelector(`option[value="${state.prompt}"]`)) { search.value = ""; list(); }
  selects.ablated.value = state.ablated;
  selects.prompt.value = state.prompt;
  for (const [id, figure] of Object.entries(figures)) {
    if (figure.shown && visible.has(id) && figure.on.some((name) => name in change)) draw(id);
    else if (figure.on.some((name) => name in change)) stale.add(id);
  }
}

// The prompts whose text, target or relation has every word of the search.
function list() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const matching = range(P).filter((p) => words.every((word) => data.prompts.search[p].includes(word)));
  selects.prompt.replaceChildren(...matching.map((p) => new Option(`${data.prompts.text[p]} → ${data.prompts.target[p].trim()}`, p)));
  status.value = words.length ? `${matching.length} of ${P} prompts` : data.prompts.note;
  return matching;
}

data.ablated.forEach((a, i) => selects.ablated.add(new Option(a.name, i)));
data.prompts.search = data.prompts.text.map((t, p) => `${t} ${data.prompts.target[p]} ${data.prompts.relation[p]}`.toLowerCase());
selects.ablated.addEventListener("change", () => update({ ablated: Number(selects.ablated.value) }));
selects.prompt.addEventListener("change", () => update({ prompt: Number(selects.prompt.value) }));
search.addEventListener("input", () => { const matching = list(); if (matching.length) update({ prompt: matching.includes(state.prompt) ? state.prompt : matching[0] }); });
list();

const container = document.getElementById("figures"), visible = new Set(), stale = new Set();
// A figure is drawn when it comes near the screen, and again only when something it shows has changed.
const watch = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const id = target.dataset.figure;
    if (!isIntersecting) visible.delete(id);
    else { visible.add(id); if (!drawn.has(id) || stale.has(id)) draw(id); }
  }
}, { rootMargin: "600px" });
for (const [id, figure] of Object.entries(figures)) {
  const element = document.createElement("figure");
  element.id = id;
  element.dataset.figure = id;
  const title = document.createElement("h2"), caption = document.createElement("figcaption");
  title.textContent = figure.title;
  caption.textContent = figure.shown ? figure.caption : data.absent[id];
  if (!figure.shown && !data.absent[id]) continue;
  element.append(title, caption);
  if (figure.shown) {
    const note = document.createElement("p"), plot = document.createElement("div");
    note.id = "note-" + id;
    plot.id = "plot-" + id;
    plot.className = "plot";
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", figure.title);
    element.append(note, plot);
    watch.observe(element);
  }
  container.append(element);
}
selects.ablated.value = state.ablated;
selects.prompt.value = state.prompt;

const again = () => { for (const id of Object.keys(figures)) if (drawn.has(id)) { if (visible.has(id)) draw(id); else stale.add(id); } };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
matchMedia("(min-width: 760px)").addEventListener("change", again);
