"""What a user may say of what a run writes beside its result: MLPerf's training log, histograms for TensorBoard."""

import dataclasses

from dlrm_jax.config import ConfigError, check_settings, require, setting, settings

OPEN, CLOSED = DIVISIONS = ("open", "closed")
STATUSES = ("", "onprem", "cloud", "research")


@dataclasses.dataclass(frozen=True)
class Submission:
    """What MLPerf's training log says of who submits, which no run knows.

    Empty: the devices for `platform`, the interaction for `benchmark`, and no line for `status`.
    """

    org: str = setting("", "Who submits.")
    division: str = setting(OPEN, "MLPerf's division.", choices=DIVISIONS)
    platform: str = setting("", "The system's name.")
    status: str = setting("", "Where the system is.", choices=STATUSES)
    benchmark: str = setting("", "MLPerf's name of the benchmark.")

    def __post_init__(self) -> None:
        check_settings(self)
        require(bool(self.org), "org is missing; name who submits, as org:NAME")


def parse_submission(text: str) -> Submission | None:
    """The Submission of `org:NAME,division:open`, the rest by default; None for an empty text."""
    if not text:
        return None
    known = [one.flag for _, one in settings(Submission)]
    values = {}
    for part in text.split(","):
        name, _, value = part.partition(":")
        require(name in known, f"mllog={text}: {name!r} is not among {', '.join(known)}; as org:NAME,division:open")
        values[name] = value
    try:
        return Submission(**values)
    except ConfigError as error:
        raise ConfigError(f"mllog={text}: {error}") from None


@dataclasses.dataclass(frozen=True)
class RecordOptions:
    """`mllog` is a Submission in words, empty for no log; `histogram_rows` bounds what histograms are of, 0: none."""

    mllog: str = setting(
        "",
        "Write the run in MLPerf's training log format, WORKDIR/mllog.txt: org:NAME says who submits; behind commas "
        "there may be division:closed (else open), platform:TEXT, status:onprem, benchmark:dlrm_dcnv2 "
        "(docs/RECORDS.md).",
    )
    histogram_rows: int = setting(
        0,
        "Every --log_every steps TensorBoard gets histograms of row norms and of gradients, for tables and MLPs, of at "
        "most so many rows of each table and numbers of each array; each time costs one to two steps. 0: none.",
        at_least=0,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        parse_submission(self.mllog)  # It checks it.

    @property
    def asked(self) -> list[str]:
        """The flags that are not their default."""
        return [f"--{one.flag}" for path, one in settings(type(self)) if getattr(self, path[0]) != one.default]
