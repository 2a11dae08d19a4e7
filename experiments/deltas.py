"""A server that follows a training, and what marking rows costs: `python experiments/deltas.py [--part=serve|steps]`.

serve: `train --publish` writes whole versions and deltas into a directory that a server follows, under --qps requests a
second, until there are --whole of the one and --deltas of the other; then deltas that are wrong in ten ways, each by
itself. Every answer is compared with the offline score of the version that it names. steps: one training, whose steps
are taken in turn with and without their rows being marked. Each writes its section of experiments/README.md.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
from measure import ROOT, replace_section, where_and_when
from serving_comparison import free_port
from soak import memory

from dlrm_jax.serving import load
from dlrm_jax.serving.artifact.native import NativeCpu
from dlrm_jax.serving.artifact.store import open_alone, write_version
from dlrm_jax.serving.artifact.store import versions as numbers_in
from dlrm_jax.serving.http import load_generator as generator
from dlrm_jax.training.reporting import versions

CONNECTIONS, SLICE_SECONDS = 32, 5.0
TABLES = ",".join(["200000"] * 4 + ["20000"] * 4 + ["100"] * 8)
TRAINING = [
    *("--dataset=synthetic", f"--table_sizes={TABLES}", "--num_dense=8", "--num_examples=100000"),
    *("--embedding_dim=16", "--bottom_mlp=64,16", "--top_mlp=64,1", "--batch_size=64", "--num_epochs=100000"),
    *("--dense_optimizer=sgd", "--table_optimizer=rowwise_adagrad", "--learning_rate=0.01", "--patience=0"),
    *("--checkpoint_every=1000000", "--eval_every=1000000", "--log_every=1000"),
]


class Client(threading.Thread):
    """Asks at a rate, a slice of time after the other, until told to stop; its answers are kept."""

    def __init__(self, target: generator.Target, bodies: list[bytes], qps: float) -> None:
        super().__init__(daemon=True)
        self.bodies, self._target, self._qps = bodies, target, qps
        self.answers: list[generator.Answer] = []
        self.stop = False

    def run(self) -> None:
        """Ask."""
        for i in itertools.count():
            if self.stop:
                break
            more = {"seed": i, "keep": self.answers.append}
            generator.run(self._target, self.bodies, self._qps, SLICE_SECONDS, CONNECTIONS, **more)


class Server:
    """A server that follows a directory, what it logs, and its memory, sampled once a second."""

    def __init__(self, model_dir: pathlib.Path, kernels: str) -> None:
        self.port, self.events, self.samples = free_port(), [], []
        command = [sys.executable, "-m", "dlrm_jax.serve", f"--model={model_dir}", f"--port={self.port}"]
        command += ["--poll_seconds=0.1", f"--kernels={kernels}", "--max_wait_ms=500"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._sample, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stderr:
            with contextlib.suppress(ValueError):
                self.events.append(json.loads(line) | {"at": time.time()})

    def _sample(self) -> None:
        while self.process.poll() is None:
            self.samples.append((time.time(), memory(self.process)))
            time.sleep(1)

    def of(self, name: str) -> list[dict]:
        """Events of a name."""
        return [event for event in list(self.events) if event.get("event") == name]

    def until(self, condition, what: str, seconds: float) -> None:
        """Wait; ends the experiment where it does not come."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end or self.process.poll() is not None:
                raise SystemExit(f"{what} did not come; the last events: {self.events[-3:]}")
            time.sleep(0.05)


def rows_file(change):
    """A change of the rows that a delta's first table names."""

    def changed(directory: pathlib.Path) -> None:
        path = min((directory / "tables").glob("*.rows.npy"))
        np.save(path, change(np.load(path)))

    return changed


def values_file(change):
    """A change of what these rows become."""

    def changed(directory: pathlib.Path) -> None:
        path = min((directory / "tables").glob("*.changed.npy"))
        np.save(path, change(np.load(path)))

    return changed


def other_weights(directory: pathlib.Path) -> None:
    """Finite, of the right size, and not those that the noted probabilities are of."""
    for path in (directory / "weights").glob("*kernel.npy"):
        np.save(path, -np.load(path))


BAD = {
    "a parent that is not there": ({"version": 10**6}, lambda directory: None),
    "another parent of that number": ({"sha256": "0" * 64}, lambda directory: None),
    "out of order: of an earlier version": ("earlier", lambda directory: None),
    "a file changed after its hash": ("changed", lambda directory: None),
    "a file that is missing": ("missing", lambda directory: None),
    "rows beyond a table": ({}, rows_file(lambda row_M: row_M + 10**6)),
    "rows in no order": ({}, rows_file(lambda row_M: row_M[::-1].copy())),
    "fewer values than rows": ({}, values_file(lambda rows: rows[:-1])),
    "NaN": ({}, values_file(lambda rows: rows * np.nan)),
    "other weights than were scored": ({}, other_weights),
}


def write_bad(model_dir: pathlib.Path, last: int, parent: dict, change) -> int:
    """The last delta once more, as one that changes the last version, but for what is wrong."""
    version = open_alone(model_dir, last)
    said = {"version": last, "sha256": version.sha256}
    if parent == "earlier":
        said = dict(version.manifest["parent"])
    elif isinstance(parent, dict):
        said |= parent
    if said["version"] > last:  # A version names none after it, so that there must be one between.
        (model_dir / str(last + 1)).mkdir()
        said["version"] = last + 1

    def write(directory: pathlib.Path) -> None:
        shutil.copytree(version.directory, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest*"))
        change(directory)

    with tempfile.TemporaryDirectory(dir=model_dir.parent) as aside:  # So that it comes at once, and as a whole.
        (pathlib.Path(aside) / str(max(numbers_in(model_dir)))).mkdir()
        written = write_version(pathlib.Path(aside), write, {"parent": said})
        path = written.directory / "signature.json"
        if parent == "changed":
            path.write_bytes(path.read_bytes().replace(b'"name"', b'"nama"', 1))
        elif parent == "missing":
            path.unlink()
        written.directory.rename(model_dir / str(written.number))
    return written.number


def serve(flags: argparse.Namespace) -> str:
    """Markdown of the server's part."""
    with tempfile.TemporaryDirectory() as folder:
        model_dir, total = pathlib.Path(folder) / "live", flags.whole + flags.deltas
        command = [sys.executable, "-m", "dlrm_jax.train", *TRAINING, f"--workdir={folder}/run", "--seed=1"]
        command += [f"--publish={model_dir}", f"--publish_every={flags.every:.0f}s", f"--keep={flags.whole + 1}"]
        command += [f"--publish_whole_every={total // flags.whole}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
        trainer = subprocess.Popen(["nice", "-n", "19", *command], env=os.environ | {"JAX_PLATFORMS": "cpu"}, **quiet)
        try:
            while not numbers_in(model_dir):
                if trainer.poll() is not None:
                    raise SystemExit("the training ended")
                time.sleep(0.1)
            return _served(flags, model_dir, total, trainer)
        finally:
            trainer.kill()
            trainer.wait()


def _served(flags: argparse.Namespace, model_dir: pathlib.Path, total: int, trainer: subprocess.Popen) -> str:
    server = Server(model_dir, flags.kernels)
    try:
        server.until(lambda: server.of("model_ready"), "the first version", 120)
        target = generator.discover(f"http://127.0.0.1:{server.port}")
        bodies = generator.make_requests(target, 1, False, 0)
        client = Client(target, bodies, flags.qps)
        client.start()
        began = time.time()

        def served() -> int:
            return server.of("model_ready")[-1]["version"]

        server.until(lambda: len(numbers_in(model_dir)) >= total, "the last version", total * flags.every * 4 + 120)
        trainer.kill()
        trainer.wait()
        last = max(numbers_in(model_dir))
        server.until(lambda: served() == last, "the last version in the server", 60)
        time.sleep(2)
        followed = time.time()
        refused = {}
        for what, (parent, change) in BAD.items():
            before = len(server.of("reload_refused"))
            number = write_bad(model_dir, last, parent, change)

            def said(number: int = number, before: int = before) -> list[str]:
                return [e["reason"] for e in server.of("reload_refused")[before:] if e["version"] == number]

            server.until(said, what, 60)
            refused[what] = said()[0]
            # What is refused goes, so that the next one is judged by itself.
            for other in [n for n in numbers_in(model_dir) if n > last]:
                shutil.rmtree(model_dir / str(other))
            time.sleep(1)
        assert served() == last
        client.stop = True
        client.join(30)
    finally:
        server.process.terminate()
        server.process.wait(30)
    return _judged(flags, model_dir, server, client, refused, (began, followed), last)


def _judged(flags, model_dir, server, client, refused, times, last) -> str:
    began, followed = times
    answers = sorted(client.answers, key=lambda answer: answer.sent)
    failed = [answer for answer in answers if answer.status != 200]
    good = [answer for answer in answers if answer.status == 200]
    version_A = np.array([int(json.loads(answer.body)["model_version"]) for answer in good])
    equal, worst = _compared(model_dir, client.bodies, good, version_A, flags.kernels)
    fresh = {event["version"]: event["seconds_since_update"] for event in server.of("first_score")}
    manifests = {number: open_alone(model_dir, number).manifest for number in numbers_in(model_dir) if number <= last}
    newest = max(seconds["last"] for seconds in fresh.values())
    known = sorted((manifests[number]["updated"]["last"] + newest, number) for number in manifests)
    moments = np.array([moment for moment, _ in known])
    due = np.searchsorted(moments, [answer.sent for answer in good])
    stale = sum(version < known[i - 1][1] for version, i in zip(version_A, due, strict=True) if i)
    of = {
        kind: [n for n, said in manifests.items() if ("parent" in said) == (kind == "delta")]
        for kind in ("whole", "delta")
    }
    size = {n: sum(f["bytes"] for f in said["files"].values()) / 1e6 for n, said in manifests.items()}
    mean = {kind: float(np.mean([size[n] for n in numbers])) for kind, numbers in of.items()}
    loaded = server.of("model_ready")
    pauses = [event["pause_ms"] for event in loaded if "pause_ms" in event]
    latency = np.array([answer.came - answer.sent for answer in good]) * 1e3
    kept = [sample for moment, sample in server.samples if began + 10 <= moment <= followed]
    fifths = [np.median(part) for part in np.array_split(kept, 5)]
    changed = np.mean([manifests[n]["rows"] for n in of["delta"]])
    numbers = [seconds[which] for which in ("last", "first") for seconds in fresh.values()]
    half = len(fresh)
    lines = [
        "| | |",
        "|---|---|",
        f"| versions followed | {len(of['whole'])} whole, {len(of['delta'])} deltas, one every {flags.every:g} s |",
        f"| of them taken by the server | {len(loaded) - len(pauses)} whole, {len(pauses)} deltas (where a whole one "
        "came meanwhile, the deltas before it are left out) |",
        f"| requests of one row, {flags.qps:g}/s | {len(answers):,}; {len(failed)} failed{_statuses(failed)}; p50 "
        f"{np.percentile(latency, 50):.1f} ms, p99 {np.percentile(latency, 99):.1f} ms, most {latency.max():.0f} ms |",
        f"| answers equal to the offline score of the version that they name | {equal:,} of {len(good):,} to the bit; "
        f"largest difference {worst:.1e} |",
        f"| versions that answered | {len(set(version_A))} |",
        f"| from the last update in a version to the first score by it | median "
        f"{np.median(numbers[:half]):.2f} s, most {newest:.2f} s; {stale} later answers were of an older version |",
        f"| from the first update in it | median {np.median(numbers[half:]):.2f} s, most {max(numbers[half:]):.2f} s |",
        f"| batches wait while a delta is written into memory and checked | median {np.median(pauses):.1f} ms, most "
        f"{max(pauses):.1f} ms |",
        f"| memory of the server, in each fifth of the time | {', '.join(f'{one:,.0f}' for one in fifths)} MB; at most "
        f"{max(kept):,.0f} MB, with two whole versions |",
        f"| bytes | a whole version {mean['whole']:.1f} MB, a delta {mean['delta']:.2f} MB on average, of "
        f"{changed:,.0f} of {_rows():,} rows: {mean['whole'] / mean['delta']:.0f} times less |",
        f"| deltas that are wrong | {len(refused)} kinds refused; version {last} went on |",
    ]
    reasons = "\n".join(f"- {what}: `{reason.replace(str(model_dir), 'DIR')}`" for what, reason in refused.items())
    return "\n".join(lines) + f"\n\nWhat the server said of each wrong delta:\n\n{reasons}"


def _compared(
    model_dir: pathlib.Path, bodies: list[bytes], good: list[generator.Answer], version_A: np.ndarray, kernels: str
) -> tuple[int, float]:
    """(answers equal to the bit to the offline score of the version that they name, the largest difference)."""
    rows = [json.loads(body.split(b"\r\n\r\n", 1)[1]) for body in bodies]
    tensors = [{one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in row["inputs"]} for row in rows]
    dense = np.concatenate([one["dense"] for one in tensors]).astype(np.float32)
    ids = np.concatenate([one["ids"] for one in tensors]).astype(np.int32)
    makes = {"make_engine": NativeCpu} if kernels == "native" else {}
    offline = {n: load(model_dir, n, **makes).predict(dense, ids) for n in sorted(set(version_A.tolist()))}
    found_A = np.float32([json.loads(answer.body)["outputs"][0]["data"][0] for answer in good])
    wanted_A = np.float32([offline[v][a.request] for v, a in zip(version_A.tolist(), good, strict=True)])
    return int((found_A == wanted_A).sum()), float(np.abs(found_A - wanted_A).max())


def _statuses(failed: list[generator.Answer]) -> str:
    found = sorted({answer.status for answer in failed})
    return f" (status {', '.join(map(str, found))})" if found else ""


def _rows() -> int:
    return sum(map(int, TABLES.split(",")))


def steps(flags: argparse.Namespace) -> str:
    """Markdown of what marking costs: pairs of pieces of one training, with and without, in turn."""
    from absl import flags as absl_flags

    from dlrm_jax.cli.flags import define_run_flags, unchecked_config
    from dlrm_jax.planning.cost import marks_bytes
    from dlrm_jax.training.run import Run
    from dlrm_jax.training.stepper import Stepper
    from dlrm_jax.training.touched import Touched

    define_run_flags()
    lines = [
        "| batch | steps, with and without in turn | ms a step without, with | CPU ms a step without, with "
        "| cost, of pairs | marking alone |",
        "|---|---|---|---|---|---|",
    ]
    for batch in (256, 2048):
        absl_flags.FLAGS(["steps", *TRAINING, f"--batch_size={batch}", "--data_on_device=always"])
        with tempfile.TemporaryDirectory() as folder:
            run = Run(unchecked_config(), pathlib.Path(folder))
            touched, state, step, alone = Touched(run.model), run.placed.init_state(0), 0, []
            count = run.feed.cut.steps
            with run.feed.train_windows(0, 0, True) as windows:
                stepper = Stepper(run.config, run.placed, run.feed, windows)
                took: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
                for marks in itertools.islice(itertools.cycle((False, True, True, False)), flags.pieces * 2 + 4):
                    wall, cpu = time.perf_counter(), time.process_time()
                    for _ in range(count):
                        taken, state = stepper(state, step, 1)
                        step += taken
                    if marks:
                        start = time.perf_counter()
                        touched.see(run.feed.host_ids(stepper.record.traveller, 0, count))
                        alone.append((time.perf_counter() - start) / count)
                    state.step.block_until_ready()
                    took[marks].append(((time.perf_counter() - wall) / count, (time.process_time() - cpu) / count))
        off, on = (np.array(took[marks][2:]) * 1e3 for marks in (False, True))
        (wall_off, cpu_off), (wall_on, cpu_on) = np.median(off, axis=0), np.median(on, axis=0)
        cost, cpu_cost = np.median(on / off, axis=0) - 1
        lines.append(
            f"| {batch:,} | {2 * len(off) * count:,} | {wall_off:.3f}, {wall_on:.3f} | {cpu_off:.3f}, {cpu_on:.3f} "
            f"| {cost:+.2%} of the time, {cpu_cost:+.2%} of the CPU's (medians of {len(off)}) "
            f"| {np.median(alone) * 1e3:.4f} ms, {np.median(alone) * 1e3 / wall_off:.2%} |"
        )
    lines += ["", f"Memory: {marks_bytes(run.model):,} bytes predicted, {touched._marks.nbytes:,} held."]
    return "\n".join(lines)


def main() -> None:
    """Run one part and write its section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("serve", "steps"), default="serve")
    parser.add_argument("--whole", type=int, default=5)
    parser.add_argument("--deltas", type=int, default=100)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two versions")
    parser.add_argument("--qps", type=float, default=500.0)
    parser.add_argument("--kernels", choices=("native", "xla"), default="native")
    parser.add_argument("--pieces", type=int, default=40, help="windows of steps with marks, and as many without")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    flags = parser.parse_args()
    text = {"serve": serve, "steps": steps}[flags.part](flags)
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    text += (
        f"\n\nMeasured {where_and_when(versions())}, load {load}; `python experiments/deltas.py --part={flags.part}`."
    )
    print(text)
    if not flags.dry:
        replace_section(ROOT / "experiments" / "README.md", f"deltas_{flags.part}", text)


if __name__ == "__main__":
    main()
