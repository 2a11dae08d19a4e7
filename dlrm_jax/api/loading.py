"""What lies in a directory, found again."""

import os
import pathlib
from typing import Any

from dlrm_jax.api.exported_model import Model
from dlrm_jax.api.preparing import Prepared
from dlrm_jax.api.run import Run
from dlrm_jax.config import ConfigError
from dlrm_jax.data.read.prepared import is_prepared


def load(directory: str | os.PathLike[str], **settings: Any) -> Run | Model | Prepared:
    """What lies in `directory`: a training run (Run), an exported model (Model), or a prepared dataset (Prepared).

    `settings` are those of Run (`checkpoint`, `data_dir`) or Model (`version`).

    >>> import dlrm_jax
    >>> dlrm_jax.load("runs/clicks")
    Run('runs/clicks', checkpoint='best')

    ConfigError, in one line, where nothing of the kind is there.
    """
    path = pathlib.Path(directory)
    if (path / "config.json").is_file():
        return Run(path, **settings)
    if is_prepared(path):
        return Prepared(path, **settings)
    if not path.is_dir():
        raise ConfigError(f"{path} is no directory; give a training run's workdir, a model's or a dataset's directory")
    return Model(path, **settings)
