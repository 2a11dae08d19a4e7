"""The status page: one HTML file without anything from elsewhere, which asks /status.json every second."""

import base64
import hashlib
from typing import Any

from dlrm_jax.data.schema.schema_io import from_dict as schema_from_dict
from dlrm_jax.data.values import time_parts
from dlrm_jax.serving.artifact.loaded import Servable

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; }
.numbers td { font-variant-numeric: tabular-nums; font-size: 1.3rem; }
textarea { width: 100%; height: 12rem; font-family: ui-monospace, monospace; }
button { font-size: 1rem; padding: .3rem 1.2rem; }
#answer { font-weight: 600; min-height: 1.5rem; } .bad { color: #b00020; }
"""

_SCRIPT = """
const at = id => document.getElementById(id);
const text = value => value === null || value === undefined ? "–" : String(value);
function rows(table, items) {
  table.replaceChildren(...items.map(item => {
    const tr = document.createElement("tr");
    for (const value of item) { const td = document.createElement("td"); td.textContent = text(value); tr.append(td); }
    return tr;
  }));
}
let asked = false;
async function renew() {
  try {
    const response = await fetch("/status.json");
    const status = await response.json();
    if (!response.ok) throw new Error(status.error);
    const model = status.model, recent = status.recent;
    at("model").textContent = `${model.name}, version ${model.version}`;
    at("state").textContent = status.ready ? "ready" : "not ready";
    at("facts").textContent = `step ${text(model.step)}, tables ${model.tables}`
      + ` (${(model.table_bytes / 1e6).toFixed(1)} MB)`
      + (model.metrics.test ? `, test AUC ${Number(model.metrics.test.auc).toFixed(5)} at export` : "")
      + `, up ${Math.round(status.uptime_seconds)} s`;
    rows(at("live"), [[recent.requests_per_second, recent.rows_per_second, recent.p50_ms, recent.p90_ms, recent.p99_ms,
                       status.queued_rows]]);
    rows(at("features"), [...model.dense.map(name => [name, "number", "", ""]),
      ...model.features.map(f => [f.name, `ids of ${f.table}`, f.rows.toLocaleString("en"), f.hotness])]);
    const refused = Object.entries(status.refused).map(([n, why]) => `Version ${n} refused: ${why}`);
    at("refused").textContent = refused.join("\\n");
    if (!asked) { at("row").value = JSON.stringify(status.example, null, 1); asked = true; }
  } catch (error) {
    at("state").textContent = "not ready: " + error.message;
  }
}
async function score(event) {
  event.preventDefault();
  const answer = at("answer");
  try {
    const body = JSON.stringify({rows: [JSON.parse(at("row").value)]});
    const response = await fetch("/v1/score", {method: "POST", headers: {"Content-Type": "application/json"}, body});
    const scored = await response.json();
    answer.className = response.ok ? "" : "bad";
    answer.textContent = response.ok ? "probability " + scored.probability[0].toFixed(6)
      + (scored.unknown ? ", unknown to training: " + Object.keys(scored.unknown).join(", ") : "") : scored.error;
  } catch (error) {
    answer.className = "bad";
    answer.textContent = error.message;
  }
}
at("form").addEventListener("submit", score);
renew();
setInterval(renew, 1000);
"""

PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>dlrm_jax server</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>
<h1 id="model">…</h1>
<p><b id="state">…</b> · <span id="facts"></span></p>
<p id="refused" class="bad"></p>
<h2>Last ten seconds</h2>
<table class="numbers"><thead><tr><th>requests/s</th><th>rows/s</th><th>p50 ms</th><th>p90 ms</th><th>p99 ms</th>
<th>rows waiting</th></tr></thead><tbody id="live"></tbody></table>
<h2><label for="row">Score one row</label></h2>
<form id="form"><textarea id="row" spellcheck="false"></textarea>
<p><button id="score">Score</button></p><p id="answer" role="status"></p></form>
<h2>What a row has</h2>
<table><thead><tr><th>feature</th><th>kind</th><th>rows</th><th>at most</th></tr></thead>
<tbody id="features"></tbody></table>
<p><a href="/metrics">metrics</a> · <a href="/openapi.json">API</a></p>
<script>{_SCRIPT}</script></body></html>
"""


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


SECURITY_HEADERS = {
    "content-security-policy": f"default-src 'none'; connect-src 'self'; img-src data:; style-src {_source(_STYLE)}; "
    f"script-src {_source(_SCRIPT)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


def example_row(servable: Servable) -> dict[str, Any]:
    """A row that can be scored: nulls where raw values are asked for and may be missing, else zeros."""
    signature = servable.signature
    if signature.schema is None:
        numbers: dict[str, Any] = dict.fromkeys(signature.dense_names, 0.0)
        return numbers | {feature.name: [0] for feature in signature.features}
    schema = schema_from_dict(dict(signature.schema))
    crossed = {name for sparse in schema.sparse if sparse.missing == "error" for name in sparse.cross}
    required = {dense.source: "0" for dense in schema.dense if dense.missing == "error"}
    for sparse in schema.sparse:
        if sparse.missing == "error" or sparse.name in crossed:
            required[sparse.source] = time_parts.example(sparse.time_format) if sparse.part else "0"
    return {name: required.get(name) for name in servable.reader.columns}
