"""MLPerf's load generator drives an exported model in process: `python experiments/mlperf_inference.py --model=DIR`.

`--scenario=Offline|Server` as MLPerf Inference defines them for DLRM; a sample is 100 to 700 user-item pairs (mean 270:
here drawn from a fixed seed, since the benchmark's own list of sizes belongs to its data). Server
holds `--latency_ms` at the 99th percentile at `--qps`. `--find` searches the highest rate that LoadGen calls VALID, has
it confirmed by a longer test, and writes the section `mlperf_<scenario>_<kernels>` of experiments/README.md.
`--accuracy` has every sample scored once and prints the AUC of the answers beside that of `predict` on the same rows.
Needs mlcommons-loadgen; its logs go to `--logs`.
"""

import argparse
import array
import json
import pathlib
import queue
import threading

import mlperf_loadgen as loadgen
import numpy as np
from measure import ROOT, replace_section, where_and_when

from dlrm_jax.host.formulations import NATIVE, XLA
from dlrm_jax.model.metrics import auc
from dlrm_jax.serving.artifact.loaded import MakeEngine, OneDevice, load
from dlrm_jax.serving.artifact.native import NativeCpu
from dlrm_jax.training.reporting import versions

_OFFLINE_RATE = "Samples per second"
_SHAPE = (1.0, 2.53)
"""Of the beta distribution of sizes between 100 and 700 pairs, whose mean is 270."""


class System:
    """The system under test: samples come in queries, are scored in order, and are answered one by one."""

    def __init__(self, model_dir: pathlib.Path, num_samples: int, max_batch: int, make_engine: MakeEngine) -> None:
        self.model = load(model_dir, batch_sizes=(256, 512, 1024, max_batch), make_engine=make_engine)
        self.model.warm_up()
        rng = np.random.default_rng(0)
        sizes = (100 + 600 * rng.beta(*_SHAPE, num_samples)).astype(int)
        limits = [f.rows for f in self.model.signature.features for _ in range(f.hotness)]
        self.dense = [rng.normal(size=(n, len(self.model.signature.dense_names))).astype(np.float32) for n in sizes]
        self.ids = [rng.integers(0, limits, (n, len(limits))).astype(np.int32) for n in sizes]
        self._queries: queue.SimpleQueue = queue.SimpleQueue()
        self._max_batch = max_batch
        threading.Thread(target=self._work, daemon=True).start()

    def issue(self, samples: list) -> None:
        """Take a query."""
        for sample in samples:
            self._queries.put(sample)

    def _work(self) -> None:
        held = None
        while True:
            batch = [held or self._queries.get()]
            rows, held = len(self.dense[batch[0].index]), None
            while rows < self._max_batch and not self._queries.empty():
                sample = self._queries.get()
                rows += len(self.dense[sample.index])
                if rows > self._max_batch:
                    held = sample  # It would start another execution; the next batch begins with it.
                    break
                batch.append(sample)
            self._answer(batch)

    def _answer(self, batch: list) -> None:
        dense = np.concatenate([self.dense[sample.index] for sample in batch])
        ids = np.concatenate([self.ids[sample.index] for sample in batch])
        scores = self.model.score(dense, ids).probability
        start = 0
        kept, responses = [], []
        for sample in batch:
            stop = start + len(self.dense[sample.index])
            kept.append(array.array("B", np.ascontiguousarray(scores[start:stop]).tobytes()))
            address, length = kept[-1].buffer_info()
            responses.append(loadgen.QuerySampleResponse(sample.id, address, length))
            start = stop
        loadgen.QuerySamplesComplete(responses)


def settings_of(flags: argparse.Namespace, qps: float, seconds: float) -> loadgen.TestSettings:
    """LoadGen's settings."""
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, flags.scenario)
    settings.mode = loadgen.TestMode.AccuracyOnly if flags.accuracy else loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = int(seconds * 1000)
    settings.offline_expected_qps = qps
    settings.server_target_qps = qps
    settings.server_target_latency_ns = int(flags.latency_ms * 1e6)
    settings.server_target_latency_percentile = 0.99
    settings.min_query_count = flags.min_queries if flags.scenario == "Server" else 1
    return settings


def run(system: System, flags: argparse.Namespace, qps: float, seconds: float = 0.0) -> str:
    """One test of LoadGen at a rate, for `seconds` or as long as the flag says; its summary."""
    log = loadgen.LogSettings()
    log.log_output.outdir = str(flags.logs)
    log.log_output.copy_summary_to_stdout = False
    under_test = loadgen.ConstructSUT(system.issue, lambda: None)
    library = loadgen.ConstructQSL(flags.samples, flags.samples, lambda indices: None, lambda indices: None)
    loadgen.StartTestWithLogSettings(under_test, library, settings_of(flags, qps, seconds or flags.seconds), log)
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(under_test)
    return (flags.logs / "mlperf_log_summary.txt").read_text()


def is_valid(summary: str) -> bool:
    """LoadGen's verdict."""
    return "Result is : VALID" in summary


def number(summary: str, name: str) -> float:
    """A value of LoadGen's summary."""
    return float(next(line.split(":")[1] for line in summary.splitlines() if line.startswith(name)))


def find(system: System, flags: argparse.Namespace) -> str:
    """The summary of a long test at the highest rate that short ones found VALID, or a little below.

    Offline's samples are as many as the expected rate needs for the asked time; each test says what to expect next.
    """
    offline = flags.scenario == "Offline"
    rate = number(run(system, flags, flags.qps), _OFFLINE_RATE) if offline else highest_valid(system, flags)
    for _ in range(flags.tries):
        qps = 1.2 * rate if offline else rate
        summary = run(system, flags, qps, flags.confirm_seconds)
        told(qps, summary)
        if is_valid(summary):
            return summary
        rate = number(summary, _OFFLINE_RATE) if offline else 0.95 * rate
    raise SystemExit(f"no rate held for {flags.confirm_seconds:g} s; begin with another --qps")


def highest_valid(system: System, flags: argparse.Namespace) -> float:
    """The highest rate that a short test found VALID, to a tenth; below all that were tried if none was."""
    best, qps, factor = 0.0, flags.qps, 1.5
    for _ in range(flags.tries):
        summary = run(system, flags, qps)
        told(qps, summary)
        if is_valid(summary):
            best = qps
        elif best:
            qps, factor = qps / factor, 1 + (factor - 1) / 2
        else:
            qps /= factor**2
        if factor < 1.1:
            break
        qps *= factor
    return best or qps


def told(qps: float, summary: str) -> None:
    """A line a test."""
    print(f"{qps:.1f}/s: {'VALID' if is_valid(summary) else 'INVALID'}", flush=True)


def section(summary: str, flags: argparse.Namespace) -> str:
    """Markdown of a summary: the verdict, the rate, the latency."""
    wanted = ("Scenario", "Mode", "Scheduled samples", "Completed samples", "Samples per second", "Result is")
    wanted += ("50.00 percentile", "99.00 percentile", "min_duration", "min_query_count", "target_latency (ns)")
    lines = [line.strip() for line in summary.splitlines() if line.strip().startswith(wanted)]
    names = ("scenario", "kernels", "seconds", "confirm_seconds", "qps", "latency_ms", "min_queries")
    given = " ".join(["--find", *(f"--{name}={getattr(flags, name)}" for name in names)])
    where = f"Measured {where_and_when(versions())}; `python experiments/mlperf_inference.py {given}`."
    return "\n".join(["```", *lines, "```", "", where])


def check_accuracy(system: System, logs: pathlib.Path) -> None:
    """AUC of LoadGen's recorded answers, with labels drawn from the model's own probabilities, beside predict's."""
    answered = {
        entry["qsl_idx"]: bytes.fromhex(entry["data"])
        for entry in json.loads((logs / "mlperf_log_accuracy.json").read_text())
    }
    got = np.concatenate([np.frombuffer(answered[i], np.float32) for i in sorted(answered)])
    want = np.concatenate([system.model.predict(system.dense[i], system.ids[i]) for i in sorted(answered)])
    labels = (np.random.default_rng(1).random(len(want)) < want).astype(np.float32)
    ours, logged = auc(want, labels), auc(got, labels)
    print(f"{len(answered)} samples, {len(want)} pairs: AUC {logged:.6f} in LoadGen's log, {ours:.6f} by predict")
    print(f"largest difference {np.abs(got - want).max():.2e}")


def main() -> None:
    """Run a scenario and print LoadGen's summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--scenario", choices=("Server", "Offline"), default="Server")
    parser.add_argument("--qps", type=float, default=20.0, help="samples a second")
    parser.add_argument("--latency_ms", type=float, default=60.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--min_queries", type=int, default=100)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--max_batch", type=int, default=2048)
    parser.add_argument("--kernels", choices=(XLA, NATIVE), default=XLA, help="as of dlrm_jax.serve")
    parser.add_argument("--find", action="store_true")
    parser.add_argument("--confirm_seconds", type=float, default=120.0, help="of --find's last test")
    parser.add_argument("--tries", type=int, default=8)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--logs", type=pathlib.Path, default=pathlib.Path("runs/mlperf"))
    flags = parser.parse_args()
    flags.logs.mkdir(parents=True, exist_ok=True)
    engine = NativeCpu if flags.kernels == NATIVE else OneDevice
    system = System(flags.model, flags.samples, flags.max_batch, engine)
    if flags.find:
        text = section(find(system, flags), flags)
        print(text)
        replace_section(ROOT / "experiments" / "README.md", f"mlperf_{flags.scenario.lower()}_{flags.kernels}", text)
        return
    summary = run(system, flags, flags.qps)
    if flags.accuracy:
        check_accuracy(system, flags.logs)
    else:
        print(summary)


if __name__ == "__main__":
    main()
