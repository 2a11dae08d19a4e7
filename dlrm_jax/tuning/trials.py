"""Trials as training runs in workdirs of their own, and what came of each: found again after a search was killed."""

import dataclasses
import json
import logging
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from dlrm_jax.config import ConfigError, from_dict, to_dict
from dlrm_jax.host import files
from dlrm_jax.host.texts import aligned, drawn
from dlrm_jax.training import reporting
from dlrm_jax.tuning.search import Round, best

_ERROR = re.compile(r"^error: (.*)$", re.MULTILINE)
_WAIT_SECONDS = 0.5
_LOG = logging.getLogger("dlrm_jax")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a trial reached in a round: the target metric on val, None where it failed, for the reason `error`."""

    trial: int
    number_of_round: int
    value: float | None
    step: int = 0
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Trials:
    """The trials of a search in `workdir`: the flags of each, over those of `flagfile`.

    `length` gives the flags of a share of the steps, `metric` is what of val is compared.
    """

    workdir: pathlib.Path
    flagfile: pathlib.Path
    flags: list[dict[str, str]]
    metric: str
    smaller_is_better: bool
    length: Callable[[float], dict[str, str]]
    command: tuple[str, ...] = (sys.executable, "-m", "dlrm_jax.train")

    def directory(self, trial: int) -> pathlib.Path:
        """The workdir of a trial's training."""
        return self.workdir / f"trial-{trial:03d}"

    def run(self, rounds: list[Round], progress: Callable[[Outcome], None]) -> list[Outcome]:
        """All outcomes, round by round; those of a search before are read, not made again."""
        outcomes: list[Outcome] = []
        going_on = list(range(len(self.flags)))
        for number, one in enumerate(rounds):
            going_on = going_on[: one.num_trials]
            of_round = []
            for trial in going_on:
                of_round.append(self._found(trial, number) or self._trained(trial, number, one.share))
                progress(of_round[-1])
            outcomes += of_round
            values = {outcome.trial: outcome.value for outcome in of_round}
            going_on = best(values, len(values), self.smaller_is_better)
        return outcomes

    def _note(self, trial: int, number: int) -> pathlib.Path:
        return self.directory(trial) / f"round-{number}.json"

    def _found(self, trial: int, number: int) -> Outcome | None:
        """What a search before noted; None where it did not come so far, failed, or had other flags."""
        noted = reporting.earlier(self.directory(trial), self._note(trial, number).name)
        if noted.get("flags") != self.flags[trial]:
            return None
        outcome: Outcome = from_dict(Outcome, noted["outcome"], str(self._note(trial, number)))
        return outcome if outcome.value is not None else None

    def _trained(self, trial: int, number: int, share: float) -> Outcome:
        """Train a trial, or go on with it, in a process of its own: one that fails, or runs out of memory, is noted."""
        directory = self.directory(trial)
        directory.mkdir(parents=True, exist_ok=True)
        self._wait_for_what_was_left(trial)
        flags = self.flags[trial] | self.length(share) | {"workdir": str(directory)}
        command = [*self.command, f"--flagfile={self.flagfile}", *(f"--{name}={text}" for name, text in flags.items())]
        with (directory / "log.txt").open("w+") as log:
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
            log.seek(0)
            text = log.read()
        result = reporting.earlier(directory, "result.json")
        value = (result.get("val") or {}).get(self.metric) if status == 0 else None
        found = _ERROR.findall(text)
        error = "" if value is not None else found[-1] if found else f"exit status {status}; see {directory}/log.txt"
        outcome = Outcome(trial, number, value, int(result.get("step") or 0), error)
        # Without its own flags a later search, whose file was changed, would take another trial's outcome.
        noted = {"flags": self.flags[trial], "outcome": to_dict(outcome)}
        reporting.write_json_atomically(self._note(trial, number), noted)
        return outcome

    def _wait_for_what_was_left(self, trial: int) -> None:
        """A search that was killed leaves the trial that it trained; two trainings in one workdir would fail."""
        lock = self.directory(trial) / files.LOCK
        if files.is_held(lock):
            _LOG.info("trial %d is still being trained, as an earlier search left it; waiting for its end", trial)
        while files.is_held(lock):
            time.sleep(_WAIT_SECONDS)


def last_of_each(outcomes: list[Outcome]) -> list[Outcome]:
    """The last outcome of each trial."""
    return list({outcome.trial: outcome for outcome in outcomes}.values())


def ranked(outcomes: list[Outcome], smaller_is_better: bool) -> list[Outcome]:
    """The last outcome of each trial, the best first: those that went further before those that did not."""
    last, order = last_of_each(outcomes), []
    for number in sorted({outcome.number_of_round for outcome in last}, reverse=True):
        values = {outcome.trial: outcome.value for outcome in last if outcome.number_of_round == number}
        order += best(values, len(values), smaller_is_better)
    by_trial = {outcome.trial: outcome for outcome in last}
    return [by_trial[trial] for trial in order] + [outcome for outcome in last if outcome.trial not in order]


def table(trials: Trials, order: list[Outcome]) -> str:
    """A row a trial: its flags, the metric on val, steps, and why it failed where it did."""
    names = list(trials.flags[0])
    rows: list[list[str]] = [["trial", *names, f"val {trials.metric}", "steps", ""]]
    for outcome in order:
        flags = [trials.flags[outcome.trial][name] for name in names]
        value = "-" if outcome.value is None else f"{outcome.value:.5f}"
        rows.append([str(outcome.trial), *flags, value, str(outcome.step), outcome.error[:80]])
    return aligned(rows, left=(len(names) + 3,))


def draw(trials: Trials, order: list[Outcome], path: pathlib.Path) -> None:
    """The metric over each flag's values, a picture a flag; numbers that span decades on a logarithmic axis."""
    from matplotlib.figure import Figure

    names = list(trials.flags[0])
    known = [outcome for outcome in order if outcome.value is not None]
    rows = -(-len(names) // 3)
    figure = Figure(figsize=(4 * min(len(names), 3), 3.2 * rows), layout="constrained")
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, min(len(names), 3), number + 1)
        texts = [drawn(trials.flags[outcome.trial][name]) for outcome in known]
        numbers = _numbers(texts)
        axes.scatter(numbers or texts, [outcome.value for outcome in known], alpha=0.7)
        axes.scatter((numbers or texts)[:1], [known[0].value], marker="*", s=200, color="C1", label="best")
        if numbers and min(numbers) > 0 and max(numbers) > 20 * min(numbers):
            axes.set_xscale("log")
        axes.set(xlabel=name, ylabel=f"val {trials.metric}" if number % 3 == 0 else "")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def _numbers(texts: list[str]) -> list[float]:
    """The texts as numbers; none where one is not."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        return []


def best_flags(trials: Trials, winner: Outcome) -> str:
    """A flag file that trains the winner's run."""
    own = trials.flags[winner.trial]
    lines = [line for line in trials.flagfile.read_text().splitlines() if line.partition("=")[0].strip("-") not in own]
    head = f"# Trial {winner.trial} of a search: val {trials.metric} {winner.value:.6f} at step {winner.step}."
    return "\n".join([head, *lines, *(f"--{name}={value}" for name, value in own.items())]) + "\n"


def require_one(order: list[Outcome]) -> Outcome:
    """The best outcome; ConfigError where all failed."""
    if order[0].value is None:
        raise ConfigError(f"all {len(order)} trials failed; the first: {order[0].error}")
    return order[0]


def as_json(trials: Trials, order: list[Outcome]) -> dict[str, Any]:
    """What tune.json says."""
    rows = [{"flags": trials.flags[outcome.trial], **to_dict(outcome)} for outcome in order]
    return {"metric": trials.metric, "best": rows[0], "trials": rows}


def kept_file(trials: Trials, settings: dict[str, Any]) -> None:
    """Note what is searched; ConfigError where the workdir holds another search."""
    path = trials.workdir / "search.json"
    if path.exists() and reporting.earlier(trials.workdir, path.name) != json.loads(json.dumps(settings)):
        raise ConfigError(f"{trials.workdir} holds another search (search.json); choose another --workdir")
    reporting.write_json_atomically(path, settings)
