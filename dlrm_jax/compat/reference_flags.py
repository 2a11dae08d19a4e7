"""The flags of dlrm_s_pytorch.py (commit 090956ee) and ours, one by one; docs/REFERENCE.md is made of this table."""

import argparse
import dataclasses
from typing import Any

from dlrm_jax.compat.weights import OPERATIONS
from dlrm_jax.config import ConfigError

READ, RECORDED, REFUSED = "read", "recorded", "refused"
"""Of a recorded run's flags: decides the trajectory; its weights and batches hold it, or it changes no number; is not
replayed."""


@dataclasses.dataclass(frozen=True)
class ReferenceFlag:
    """A flag of the reference with its default there, what one says here instead, and its use in a replay."""

    name: str
    default: Any
    ours: str
    use: str = RECORDED


_PREPARE_TERABYTE = "`python -m dlrm_jax.prepare --schema=criteo_terabyte`"

REFERENCE_FLAGS = (
    # The model.
    ReferenceFlag("arch-sparse-feature-size", 2, "`--embedding_dim`"),
    ReferenceFlag("arch-embedding-size", "4-3-2", "the data says it; of `--dataset=synthetic` `--table_sizes=4,3,2`"),
    ReferenceFlag("arch-mlp-bot", "4-3-2", "`--bottom_mlp=3,2`: the data says how many numbers there are"),
    ReferenceFlag("arch-mlp-top", "4-2-1", "`--top_mlp=4,2,1`"),
    ReferenceFlag("arch-interaction-op", "dot", "`--interaction=dot` or `cat`", READ),
    ReferenceFlag("arch-interaction-itself", False, "`--self_interaction`", READ),
    ReferenceFlag(
        "weighted-pooling", None, "`--learned_pooling` for `learned`; `fixed`, weights of 1, is what sums are", READ
    ),
    ReferenceFlag("md-flag", False, "`--compress_tables=mixed`"),
    ReferenceFlag("md-threshold", 200, "`--compress_tables=mixed,threshold=200`"),
    ReferenceFlag("md-temperature", 0.3, "`--compress_tables=mixed,temperature=0.3`"),
    ReferenceFlag(
        "md-round-dims", False, "`--compress_tables=mixed,round_dims=1`, the default here; there it ends in an error"
    ),
    ReferenceFlag("qr-flag", False, "`--compress_tables=qr`"),
    ReferenceFlag("qr-threshold", 200, "`--compress_tables=qr,threshold=200`"),
    ReferenceFlag(
        "qr-operation",
        "mult",
        "`--compress_tables=qr,combine=mul`, `sum` for `add`, `concat`; `init=dlrm` draws as the reference does",
        READ,
    ),
    ReferenceFlag("qr-collisions", 4, "`--compress_tables=qr,collisions=4`"),
    ReferenceFlag("activation-function", "relu", "`--activation`; there it is read and not used"),
    # The loss.
    ReferenceFlag("loss-function", "mse", "`--loss`: `bce` by default", READ),
    ReferenceFlag("loss-weights", "1.0-1.0", "`--class_weights=1,1`", READ),
    ReferenceFlag("loss-threshold", 0.0, "`--loss_threshold`", READ),
    ReferenceFlag("round-targets", False, "none: labels are 0 or 1; a schema's `threshold` cuts a number"),
    # The data.
    ReferenceFlag("data-size", 1, "`--num_examples`"),
    ReferenceFlag("num-batches", 0, "`--num_steps`"),
    ReferenceFlag("data-generation", "random", "`--dataset=synthetic`, or `--data_dir` for `dataset`"),
    ReferenceFlag("rand-data-dist", "uniform", "none; `--id_skew` says how unequal ids are"),
    ReferenceFlag("rand-data-min", 0, "none"),
    ReferenceFlag("rand-data-max", 1, "none"),
    ReferenceFlag("rand-data-mu", -1, "none"),
    ReferenceFlag("rand-data-sigma", 1, "none"),
    ReferenceFlag("data-trace-file", "./input/dist_emb_j.log", "`--id_trace`, with `{}` for the feature's number"),
    ReferenceFlag("data-set", "kaggle", f"`--dataset=criteo_kaggle`; for `terabyte` {_PREPARE_TERABYTE}"),
    ReferenceFlag("raw-data-file", "", "`--data_dir`, or `python -m dlrm_jax.prepare --input`"),
    ReferenceFlag("processed-data-file", "", "`python -m dlrm_jax.prepare --schema=dlrm_npz --input`"),
    ReferenceFlag(
        "data-randomize",
        "total",
        "`--shuffle`: rows are permuted anew in each epoch, there once; `--noshuffle` for `none`",
    ),
    ReferenceFlag("data-trace-enable-padding", False, "none"),
    ReferenceFlag("max-ind-range", -1, "`modulo` in a schema; of `--dataset=criteo_kaggle` `--max_rows_per_table`"),
    ReferenceFlag("data-sub-sample-rate", 0.0, "none: thin out the log before it is prepared"),
    ReferenceFlag("num-indices-per-lookup", 10, "`--hotness`"),
    ReferenceFlag("num-indices-per-lookup-fixed", False, "none: bags of `--dataset=synthetic` are full"),
    ReferenceFlag("num-workers", 0, "none: threads read by themselves"),
    ReferenceFlag("memory-map", False, "none: preparation always streams"),
    # Training.
    ReferenceFlag("mini-batch-size", 1, "`--batch_size`"),
    ReferenceFlag("nepochs", 1, "`--num_epochs`"),
    ReferenceFlag("learning-rate", 0.01, "`--learning_rate`", READ),
    ReferenceFlag("print-precision", 5, "none"),
    ReferenceFlag("numpy-rand-seed", 123, "`--seed`"),
    ReferenceFlag("sync-dense-params", True, "none: all devices hold the same weights"),
    ReferenceFlag(
        "optimizer",
        "sgd",
        "`--dense_optimizer` and `--table_optimizer`: `sgd` and `sgd`, `adagrad` and `adagrad`, for `rwsadagrad` "
        "`adagrad` and `rowwise_adagrad`",
        READ,
    ),
    ReferenceFlag("dataset-multiprocessing", False, "none: preparation uses all cores"),
    ReferenceFlag("lr-num-warmup-steps", 0, "`--warmup_steps`; with `--lr_compat=dlrm` as there", READ),
    ReferenceFlag("lr-decay-start-step", 0, "`--decay_start_step`", READ),
    ReferenceFlag("lr-num-decay-steps", 0, "`--decay_steps`", READ),
    # Scoring and export.
    ReferenceFlag("inference-only", False, "`python -m dlrm_jax.evaluate`"),
    ReferenceFlag("quantize-mlp-with-bit", 32, "none", REFUSED),
    ReferenceFlag("quantize-emb-with-bit", 32, "`python -m dlrm_jax.export --tables=int8` or `int4`", REFUSED),
    ReferenceFlag("save-onnx", False, "none; `python -m dlrm_jax.export` writes StableHLO"),
    # Devices.
    ReferenceFlag("use-gpu", False, "none: all devices there are, once `.[gpu]` is installed"),
    ReferenceFlag("local_rank", -1, "`--process_id`", REFUSED),
    ReferenceFlag("dist-backend", "", "none", REFUSED),
    # What is printed.
    ReferenceFlag("print-freq", 1, "`--log_every`"),
    ReferenceFlag("test-freq", -1, "`--eval_every`: on val; test is scored once, at the end"),
    ReferenceFlag("test-mini-batch-size", -1, "`--eval_batch_size`"),
    ReferenceFlag("test-num-workers", -1, "none"),
    ReferenceFlag("print-time", False, "always: `metrics.jsonl`, `result.json`"),
    ReferenceFlag("print-wall-time", False, "always: `metrics.jsonl`, `result.json`"),
    ReferenceFlag("debug-mode", False, "none"),
    ReferenceFlag("enable-profiling", False, "`--profile_steps`; `python -m dlrm_jax.benchmark`", REFUSED),
    ReferenceFlag("plot-compute-graph", False, "none", REFUSED),
    ReferenceFlag("tensor-board-filename", "run_kaggle_pt", "`WORKDIR/tensorboard`"),
    # Checkpoints.
    ReferenceFlag("save-model", "", "`--workdir`"),
    ReferenceFlag(
        "load-model",
        "",
        "`--workdir` goes on; `--init_from` begins with another run's weights; a `.pt`: below",
        REFUSED,
    ),
    # MLPerf.
    ReferenceFlag("mlperf-logging", False, "`--mllog=org:NAME`; AUC is always computed, of all rows", REFUSED),
    ReferenceFlag("mlperf-acc-threshold", 0.0, "`--target_metric=accuracy --target_value=0.789`", REFUSED),
    ReferenceFlag("mlperf-auc-threshold", 0.0, "`--target_metric=auc --target_value=0.8025`", REFUSED),
    ReferenceFlag("mlperf-bin-loader", False, "`python -m dlrm_jax.prepare --schema=mlperf_bin`", REFUSED),
    ReferenceFlag("mlperf-bin-shuffle", False, "`--shuffle`", REFUSED),
    ReferenceFlag("mlperf-grad-accum-iter", 1, "`--num_micro_batches`, of which `--batch_size` is the whole", REFUSED),
)

_CHOICES = {"qr-operation": tuple(OPERATIONS)}


def parse_reference_flags(argv: list[str]) -> argparse.Namespace:
    """The flags of dlrm_s_pytorch.py that decide a trajectory, with its defaults; ConfigError for one not supported."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in REFERENCE_FLAGS:
        if flag.use != READ:
            continue
        if flag.default is False:
            parser.add_argument(f"--{flag.name}", action="store_true")
        else:
            kind = str if flag.default is None else type(flag.default)
            parser.add_argument(f"--{flag.name}", type=kind, default=flag.default, choices=_CHOICES.get(flag.name))
    flags, rest = parser.parse_known_args(argv)
    recorded = {flag.name for flag in REFERENCE_FLAGS if flag.use == RECORDED}
    for word in rest:
        if word.startswith("--") and word[2:].partition("=")[0] not in recorded:
            raise ConfigError(f"reference flag {word} is not supported")
    return flags
