"""ClickLog: a prepared dataset as a TFDS builder, to subclass for a log of one's own.

    class MyLog(ClickLog):
        VERSION = tfds.core.Version("1.0.0")
        SCHEMA = "my_log.yaml"                      # a file, a preset's name, or a Schema
        INPUT = "/data/log-*.csv.gz"

    builder = MyLog(data_dir="data")
    builder.download_and_prepare()                  # streams, restartable; as python -m dlrm_jax.prepare
    blocks = builder.as_data_source("train")        # records are blocks of rows (see blocks.py)

The directory is one that `--data_dir` takes: `python -m dlrm_jax.train --data_dir=data/my_log/1.0.0`. No TensorFlow.
"""

import dataclasses
import pathlib
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats.source import expand
from dlrm_jax.data.prepare import blocks
from dlrm_jax.data.prepare.preparation import Options, prepare
from dlrm_jax.data.schema import schema_io
from dlrm_jax.data.schema.presets import PRESETS
from dlrm_jax.data.schema.schema import Schema


class ClickLog(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base class; subclasses name a schema and the log's files."""

    VERSION = tfds.core.Version(blocks.VERSION)
    SCHEMA: ClassVar[str | Schema] = ""
    INPUT: ClassVar[str] = ""
    OPTIONS: ClassVar[Options] = Options()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(file_format=kwargs.pop("file_format", "array_record"), **kwargs)

    def schema(self) -> Schema:
        """The schema, under the builder's name."""
        schema = self.SCHEMA
        if isinstance(schema, str):
            schema = PRESETS[schema][1]() if schema in PRESETS else schema_io.load(pathlib.Path(schema))
        return dataclasses.replace(schema, name=self.name)

    def _info(self) -> tfds.core.DatasetInfo:
        schema = self.schema()
        num_slots = sum(feature.hotness for feature in schema.sparse)
        features = blocks.features(len(schema.dense), num_slots, bool(schema.weight))
        return tfds.core.DatasetInfo(builder=self, features=features, description=self.__doc__ or "")

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        del dl_manager, download_config  # The log is on disk already, and all of it is prepared.
        if not self.INPUT:
            raise ConfigError(f"{type(self).__name__} has no INPUT: name the log's files")
        # TFDS gives every attempt a new temporary directory; ours keeps its name, so that a stopped one goes on.
        temporary = pathlib.Path(self.data_path)
        directory = temporary.parent / f"preparing-{self.version}"
        prepare(expand(self.INPUT, "INPUT"), directory, self.schema(), self.OPTIONS)
        for path in directory.iterdir():
            path.rename(temporary / path.name)
        directory.rmdir()
        self.info.set_splits(tfds.builder_from_directory(temporary).info.splits)

    def _split_generators(self, dl_manager: Any) -> Any:
        raise NotImplementedError("the preparation writes all splits; see _download_and_prepare")

    def _generate_examples(self) -> Any:
        raise NotImplementedError("the preparation writes all splits; see _download_and_prepare")
