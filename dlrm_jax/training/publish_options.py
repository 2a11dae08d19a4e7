"""What a user may say of the versions that a training publishes."""

import dataclasses
import re

from dlrm_jax.config import Needs, check_settings, require, setting

TYPES = ("float32", "bfloat16", "int8", "int4")
"""How tables are stored that are served (serving/artifact/signature.py)."""
SPARE_ROWS = "Share of its rows that each table gets more, for values that deltas bring when the data grew; 0: none."
"""The help of --spare_rows, which `export` has too."""
_PUBLISHES = Needs(lambda run: bool(run.publishing.model_dir), "it is for --publish")


@dataclasses.dataclass(frozen=True)
class PublishOptions:
    """Versions of a model that is being trained, for a server that follows them: whole ones, and deltas between.

    `every` is a number of steps, or of seconds as 30s.
    """

    model_dir: str = setting(
        "",
        "While it trains, write the model's versions into this directory, which a server follows: whole now and then, "
        "and between them only the rows that changed (docs/PUBLISHING.md).",
        flag="publish",
    )
    every: str = setting(
        "60s", "Time between two versions: steps, as 1000, or seconds, as 30s.", flag="publish_every", needs=_PUBLISHES
    )
    whole_every: int = setting(
        20,
        "Every so manyth version is whole, counted on where versions of before are in --publish.",
        at_least=1,
        flag="publish_whole_every",
        needs=_PUBLISHES,
    )
    tables: str = setting(
        "float32",
        "How published versions store embedding rows.",
        choices=TYPES,
        flag="publish_tables",
        needs=_PUBLISHES,
    )
    spare_rows: float = setting(0.0, SPARE_ROWS, needs=_PUBLISHES)
    keep: int = setting(
        2,
        "Whole versions that are kept of those in --publish, each with the deltas behind it; older ones are deleted.",
        at_least=1,
        needs=_PUBLISHES,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        require_spare_rows(self.spare_rows)
        require(
            bool(re.fullmatch(r"[1-9]\d{0,8}s?", self.every)),
            f"publish_every is {self.every!r:.40}; give steps, as 1000, or seconds, as 30s",
        )

    @property
    def steps(self) -> int:
        """Steps between two versions; 0 where seconds say."""
        return 0 if self.every.endswith("s") else int(self.every)

    @property
    def seconds(self) -> float:
        """Seconds between two versions; 0 where steps say."""
        return float(self.every[:-1]) if self.every.endswith("s") else 0.0


def require_spare_rows(share: float) -> None:
    """ConfigError for a share of rows to spare that is none."""
    require(0 <= share <= 10, f"--spare_rows={share:g}; give a share of the rows, from 0 to 10")
