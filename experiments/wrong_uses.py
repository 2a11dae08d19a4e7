"""Wrong uses, as a user types them, and the one line that each prints: `python experiments/wrong_uses.py`.

Runs every command in a scratch directory that has a small log, its dataset, a trained run and an exported model, and
writes what was printed into `experiments/wrong_uses.md`. `tests/cli/wrong_uses_test.py` holds that each ends with a
status other than 0, one line, and no traceback, and that the line says what the case here expects.
"""

import dataclasses
import datetime
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE = ROOT / "experiments" / "wrong_uses.md"


def _log(rows: int = 300) -> str:
    row = "{click},u{user},i{item},{price},2024-01-{day:02d}\n"
    lines = (
        row.format(click=i * 7 % 10 // 7, user=i % 23, item=i * i % 31, price=i % 50 / 4, day=i // 24 % 28 + 1)
        for i in range(rows)
    )
    return "click,user,item,price,day\n" + "".join(lines)


_SCHEMA = "name: mine\nlabel: click\ndense: [price]\nsparse: [user, item]\n"


def _adult(rows: int, ending: str = "") -> str:
    incomes = [(">50K" if i % 4 == 0 else "<=50K") + ending for i in range(rows)]
    return "income,user\n" + "".join(f"{income},u{i % 7}\n" for i, income in enumerate(incomes))


FILES: dict[str, str | bytes] = {
    "log.csv": _log(),
    "mine.yaml": _SCHEMA + "timestamp: day\nsplit: {by: time}\n",
    "empty.csv": "",
    "header.csv": "click,user\n",
    "ragged.csv": _log(20) + "1,u1\n",
    "word.csv": "click,user,item,price,day\nmaybe,u1,i1,3,2024-01-01\n",
    "date.csv": "click,user,item,price,day\n1,u1,i1,3,2024-01-01\n0,u2,i2,4,0000-00-00\n",
    "mixed.csv": "click,user,item,price,day\n1,u1,i1,3,2024-01-01\n0,u2,i2,4,1704067200\n",
    "price.csv": "click,user,item,price,day\n1,u1,i1,cheap,2024-01-01\n",
    "comma.csv": "click;user;item;price\n1;u1;i1;3,5\n0;u2;i2;4,5\n",
    "latin.csv": "click,user,item,price,day\n1,J\u00f6rg,i1,3,2024-01-01\n".encode("latin-1"),
    "semicolons.csv": _log(50).replace(",", ";"),
    "rowless.csv": "click,user,item,price,day\n",
    "seconds.csv": _log(50).replace("2024-01-0", "170406720"),
    "half/staging/job.json": "{}",
    "rarer.yaml": _SCHEMA.replace("item]", "{name: item, min_count: 5}]") + "timestamp: day\nsplit: {by: time}\n",
    "lists.yaml": _SCHEMA.replace("item]", "{name: item, separator: ';'}]") + "timestamp: day\nsplit: {by: time}\n",
    "years.yaml": _SCHEMA + "timestamp: day\nsplit: {by: time, period: 1y}\n",
    "seven.yaml": _SCHEMA + "timestamp: day\nsplit: {by: time, period: 7}\n",
    "shares.yaml": _SCHEMA + "timestamp: day\nsplit: {by: time, period: 1d, val: 0.1}\n",
    "weeks.yaml": _SCHEMA + "timestamp: day\nsplit: {by: time, period: 1w, val: 2}\n",
    "timeless.yaml": _SCHEMA + "timestamp: day\nsplit: {by: random, period: 1d}\n",
    "unclosed.gz": b"\x1f\x8b\x08\x00" + bytes(20),
    "text.parquet": "not parquet at all",
    "array.json": '[{"click": 1}]\n',
    "nested.jsonl": '{"click": 1, "user": "u1", "item": "i", "price": {"a": 0}}\n',
    "absent.jsonl": '{"click": 1, "user": "u1", "item": "i"}\n',
    "nolabel.csv": "a,b\n" + "".join(f"{i},x{i % 3}\n" for i in range(50)),
    "zeros.csv": "spam,b\n" + "".join(f"0,x{i % 3}\n" for i in range(50)),
    "grades.csv": "click,b\n" + "".join(f"{i % 5},x{i % 3}\n" for i in range(50)),
    "bought.csv": "label,b\n" + "".join(f"{'purchased' if i % 2 else 'bounced'},x{i % 3}\n" for i in range(50)),
    "twice.csv": "click,user,user\n1,a,b\n",
    "adult.csv": _adult(40),
    "adult_test.csv": _adult(40, "."),
    "plain.yaml": _SCHEMA,
    "adult.yaml": 'name: adult\nlabel: {column: income, positive: [">50K"]}\nsparse: [user]\n',
    "richer.yaml": "name: adult\nlabel: {column: income, positive: [50K]}\nsparse: [user]\n",
    "yes.yaml": "name: mine\nlabel: {column: click, positive: [yes]}\nsparse: [user]\n",
    "column.yaml": _SCHEMA.replace("[user, item]", "[user, colour]"),
    "unknown.yaml": _SCHEMA + "colour: red\n",
    "hash.yaml": _SCHEMA.replace("[user, item]", "[{name: user, ids: hash}]"),
    "broken.yaml": "name: [mine\nlabel: click",
    "huge.yaml": _SCHEMA.replace("[user, item]", "[{name: user, ids: hash, size: 3000000000}]"),
    "encoding.yaml": _SCHEMA + "encoding: utf-9\n",
    "decimal.yaml": _SCHEMA + 'decimal: "x"\n',
    "long.yaml": _SCHEMA.replace("name: mine", f"name: {'n' * 300}"),
    "nobody.json": '{"tables": {"nobody": "row_wise"}}',
    "nobody_table.json": '{"tables": {"nobody": {"dim": 8}}}',
    "search.yaml": "{method: grid, flags: {learning_rate: [0.1]}}",
    "no_search.yaml": "{method: grid, flags: {learning_rat: [0.1]}}",
    "list.json": '{"tables": [1, 2]}',
    "empty_token": "",
    "kaggle.flags": (ROOT / "experiments" / "shape_kaggle.flags").read_text(),
}
"""What lies in the scratch directory besides `data`, `runs/mine` and `models/mine`."""

SMALL = "--embedding_dim=4 --bottom_mlp=4 --top_mlp=4,1 --batch_size=64"


@dataclasses.dataclass(frozen=True)
class Case:
    """A command, without `python -m dlrm_jax.`, and what its one line must say."""

    command: str
    says: str


CASES: dict[str, tuple[Case, ...]] = {
    "A log's values and columns": (
        Case("prepare --input=empty.csv --output=d1", "empty.csv"),
        Case("prepare --input=header.csv --output=d1", "header.csv"),
        Case("prepare --input=ragged.csv --output=d2", "2 columns; expected 5"),
        Case("prepare --input=word.csv --output=d3 --schema=mine.yaml", "line 2, column click: 'maybe'"),
        Case("prepare --input=date.csv --output=d4 --schema=mine.yaml", "line 3, column day: '0000-00-00'"),
        Case("prepare --input=mixed.csv --output=d5 --schema=mine.yaml", "a number in 1 rows and a date in 1"),
        Case("prepare --input=price.csv --output=d6 --schema=mine.yaml", "line 2, column price: 'cheap'"),
        Case("prepare --input=comma.csv --output=d7 --schema=plain.yaml", "say decimal:"),
        Case("prepare --input=latin.csv --output=d8 --schema=mine.yaml", "byte 0xf6 is not UTF-8"),
        Case(
            "prepare --input=latin.csv --output=d9 --schema=mine.yaml --on_bad_row=skip_and_count",
            "no rows in latin.csv",
        ),
        Case("prepare --input=unclosed.gz --output=d10", "unclosed.gz"),
        Case("prepare --input=text.parquet --output=d11", "text.parquet"),
        Case("prepare --input=array.json --output=d12", "no JSON object among its first lines"),
        Case("prepare --input=nested.jsonl --output=d13 --schema=plain.yaml", "is an object, not a value"),
        Case("prepare --input=absent.jsonl --output=d14 --schema=plain.yaml", "no line of absent.jsonl has 'price'"),
        Case("prepare --input=nolabel.csv --output=d15", "cannot tell the label"),
        Case("prepare --input=zeros.csv --output=d16", "cannot tell the label"),
        Case("prepare --input=grades.csv --output=d17", "column click is called like a label"),
        Case("prepare --input=bought.csv --output=d18", "positive: ['purchased']"),
        Case("prepare --input=twice.csv --output=d19 --schema=yes.yaml", "positive is True"),
        Case("prepare --input=adult.csv --output=d20 --schema=richer.yaml", "no row has the positive text '50K'"),
        Case(
            "prepare --input=adult.csv,adult_test.csv --output=d21 --schema=adult.yaml",
            "adult_test.csv: no row of this file has a positive text",
        ),
        Case("prepare --input=log.csv --output=d22 --schema=column.yaml", "no column 'colour'"),
        Case("prepare --input=log.csv --output=d22 --schema=unknown.yaml", "unknown colour"),
        Case("prepare --input=log.csv --output=d22 --schema=hash.yaml", "ids: hash needs size"),
        Case("prepare --input=log.csv --output=d22 --schema=broken.yaml", "neither YAML nor JSON"),
        Case("prepare --input=log.csv --output=d22 --schema=huge.yaml", "at most 2147483647"),
        Case("prepare --input=log.csv --output=d22 --schema=encoding.yaml", "encoding is 'utf-9'"),
        Case("prepare --input=log.csv --output=d22 --schema=decimal.yaml", "decimal is 'x'"),
        Case("prepare --input=log.csv --output=d22 --schema=long.yaml", "longer than 100 bytes"),
        Case("prepare --input=log.csv --output=d22 --schema=kaggle", "--schema=kaggle is neither a file"),
    ),
    "Days and growth": (
        Case("prepare --input=log.csv --output=d25 --schema=years.yaml", "period is '1y'"),
        Case("prepare --input=log.csv --output=d25 --schema=seven.yaml", "column day holds dates"),
        Case("prepare --input=log.csv --output=d26 --schema=shares.yaml", "val is 0.1; beside a period"),
        Case("prepare --input=log.csv --output=d27 --schema=weeks.yaml", "leave none for train"),
        Case("prepare --input=log.csv --output=d28 --schema=timeless.yaml", "a period needs by: time"),
        Case("prepare --input=log.csv --extend=data --output=data", "is the dataset of --extend"),
        Case("prepare --input=log.csv --extend=data --output=data/next", "lie one in the other"),
        Case("prepare --input=log.csv --extend=nope --output=g1", "--extend=nope holds no prepared dataset"),
        Case("prepare --input=log.csv --extend=half --output=g1", "--extend=half holds an unfinished preparation"),
        Case("prepare --input=semicolons.csv --extend=data --output=g2", "separated by ';'"),
        Case("prepare --input=empty.csv --extend=data --output=g3", "empty.csv"),
        Case("prepare --input=rowless.csv --extend=data --output=g4", "no rows in rowless.csv"),
        Case("prepare --input=nolabel.csv --extend=data --output=g5", "no column 'click'"),
        Case(
            "prepare --input=word.csv --extend=data --output=g6 --on_bad_row=skip_and_count", "no rows in word.csv; all"
        ),
        Case("prepare --input=seconds.csv --extend=data --output=g7", "which have no common order"),
        Case("prepare --input=log.csv --extend=data --output=g8 --schema=rarer.yaml", "sparse[1].min_count: 5"),
        Case("prepare --input=log.csv --extend=data --output=g8 --schema=lists.yaml", "sparse[1].separator: ';'"),
        Case("prepare --input=log.csv --output=g9 --refit", "--refit has no effect without --extend"),
    ),
    "Files and directories": (
        Case("prepare --input='*.tsv' --output=d30", "matches no file"),
        Case("prepare --input=. --output=d30", "is not a file"),
        Case("prepare --output=d30", "--input is missing"),
        Case("prepare --input=log.csv", "--output is missing"),
        Case("prepare --input=log.csv --output=log.csv", "--output=log.csv"),
        Case("prepare --input=log.csv --output=runs", "is not empty"),
        Case("prepare --input=word.csv --output=data --schema=mine.yaml", "prepared from something else"),
        Case("prepare --input=log.csv --output=d30 --max_memory=lots", "is no amount of memory"),
        Case("prepare --input=log.csv --output=d30 --max_memory=1MB", "below the least"),
        Case("prepare --describe=runs", "is not a prepared dataset"),
        Case("prepare log.csv data", "unexpected argument 'log.csv'"),
        Case("train --data_dir=nope --workdir=w", "--data_dir=nope"),
        Case("train --data_dir=data --workdir=log.csv", "--workdir=log.csv"),
        Case("train --dataset=criteo_kaggle --data_dir=nope --workdir=raw1", "nope holds none of train.txt, train.csv"),
        Case("train --dataset=criteo_kaggle --data_dir=empty.csv --workdir=raw2", "no rows in empty.csv"),
        Case("train --dataset=criteo_kaggle --data_dir=log.csv --workdir=raw3", "line 1: 5 columns; expected 40"),
        Case("train --dataset=movielens_100k --data_dir=nope --workdir=raw4", "nope is not a directory"),
        Case("train --dataset=movielens_100k --data_dir=models --workdir=raw5", "models holds none of ml-100k.inter"),
        Case("train --dataset=movielens --data_dir=data --workdir=raw6", "--dataset=movielens, but data holds mine"),
        Case("train --dataset=criteo_kaggle --data_dir=log.csv", "--workdir is missing"),
        Case("plan --dataset=criteo_kaggle --data_dir=log.csv", "say in which --workdir"),
        Case(
            "plan --dataset=criteo_kaggle --data_dir=log.csv --workdir=log.csv", "--workdir=log.csv must be a directory"
        ),
        Case("train --flagfile=nope.flags", "--flagfile"),
        Case("evaluate --workdir=nope", "nope/config.json does not exist"),
        Case("evaluate --workdir=runs/mine --checkpoint=best5", "no checkpoint 'best5'"),
        Case("evaluate --workdir=runs/mine --predictions_out=nodir/s.csv", "--predictions_out=nodir/s.csv"),
        Case("evaluate --workdir=runs/mine --predictions_out=data", "--predictions_out=data is a directory"),
        Case("export --workdir=runs/mine --out=log.csv", "--out=log.csv"),
        Case("plan --json=nodir/p.json", "--json=nodir/p.json"),
        Case("plan --picture=data", "--picture=data"),
        Case("benchmark --json=log.csv/x.json", "--json=log.csv/x.json"),
        Case("serve --model=nope", "nope holds no model version"),
        Case("serve --model=models/mine --token_file=nope", "--token_file=nope"),
        Case("serve --model=models/mine --token_file=empty_token", "is empty"),
        Case("serve --model=models/mine --tls_cert=log.csv", "go together"),
        Case("loadtest --url=http://127.0.0.1:1 --seconds=1", "no model to ask"),
        Case("loadtest --json=nodir/x.json", "--json=nodir/x.json"),
    ),
    "Runs that go on": (
        Case(f"train --data_dir=data --workdir=runs/mine --num_steps=1 {SMALL}", "nothing was changed"),
        Case(
            f"train --data_dir=data --workdir=runs/mine --num_epochs=3 {SMALL} --learning_rate=0.01",
            "--allow_schedule_change",
        ),
        Case(f"train --data_dir=data --workdir=runs/mine --num_epochs=3 {SMALL} --seed=5", "holds another run"),
        Case(
            f"train --data_dir=data --workdir=runs/mine --num_epochs=3 {SMALL} --target_metric=log_loss",
            "chose its best checkpoint by auc",
        ),
        Case("train --workdir=runs/mine --num_examples=1000", "holds another run"),
        Case("evaluate --workdir=runs/mine --data_dir=runs", "runs"),
    ),
    "Models that go on": (
        Case(f"train --data_dir=data --workdir=w1 --init_from=nowhere {SMALL}", "is no directory; give the workdir"),
        Case(f"train --data_dir=data --workdir=w2 --init_from=runs {SMALL}", "holds neither checkpoints of a run nor"),
        Case(f"train --data_dir=data --workdir=w3 --init_from=runs/mine {SMALL} --top_mlp=5,1", "--init_only=tables"),
        Case(
            f"train --data_dir=data --workdir=w4 --init_from=runs/mine {SMALL} --embedding_dim=8 --bottom_mlp=8",
            "table 'user' has rows of 4 there and of 8 here",
        ),
        Case(
            f"train --num_examples=500 --workdir=w5 --init_from=runs/mine {SMALL}", "num_dense: 6 != 1; make them equal"
        ),
        Case(f"train --data_dir=data --workdir=runs/mine --init_from=runs/planted {SMALL}", "leave --init_from out"),
        Case("train --num_examples=500 --workdir=w6 --init_steps=reset", "it is for --init_from; leave it out"),
        Case("train --num_examples=500 --workdir=w7 --drift=0.1", "it needs --num_periods; leave it out"),
        Case("train --num_examples=500 --workdir=w8 --num_periods=2", "train, val and test need 3"),
        Case("online --num_examples=500 --num_periods=4", "--workdir is missing"),
        Case("online --data_dir=data --workdir=w9", "is not split by periods"),
        Case(
            f"online --num_examples=500 --num_periods=4 --workdir=w10 --periods=p1: {SMALL}", "there is no period 'p1'"
        ),
        Case(f"online --num_examples=500 --num_periods=4 --workdir=w11 --frozen_after=4 {SMALL}", "one of 4 periods"),
        Case(f"online --num_examples=500 --num_periods=4 --workdir=w12 --evict_after=2 {SMALL}", "with oov: true"),
        Case(f"online --data_dir=data --workdir=runs/mine {SMALL}", "is not split by periods"),
    ),
    "Settings": (
        Case("train --data_dir=data --workdir=w --class_weights=0.5,2", "it is for --loss=wbce"),
        Case("train --data_dir=data --workdir=w --loss=wbce --class_weights=0,0", "nothing would be learned"),
        Case("train --data_dir=data --workdir=w --momentum=0.5", "it is for --dense_optimizer=momentum"),
        Case("train --data_dir=data --workdir=w --table_sizes=5,6", "it is for --dataset=synthetic"),
        Case("train --data_dir=data --workdir=w --cross_layers=2", "it is for --interaction=cross"),
        Case("train --data_dir=data --workdir=w --decay_power=3", "it needs --decay_steps"),
        Case("train --data_dir=data --workdir=w --learning_rate=inf", "it must be finite"),
        Case("train --data_dir=data --workdir=w --learning_rate=0", "it must be positive"),
        Case("train --data_dir=data --workdir=w --target_value=1.5", "which auc cannot reach"),
        Case("train --data_dir=data --workdir=w --patience=-1", "it must not be negative"),
        Case("train --data_dir=data --workdir=w --batch_size=0", "it must be at least 1"),
        Case("train --data_dir=data --workdir=w --batch_size=100 --num_micro_batches=3", "does not split"),
        Case("train --data_dir=data --workdir=w --embedding_dim=8", "bottom_mlp ends in 16"),
        Case("train --data_dir=data --workdir=w --top_mlp=64,2", "the last width must be 1"),
        Case("train --data_dir=data --workdir=w --loss_threshold=0.5", "it must lie in [0, 0.5)"),
        Case("train --data_dir=data --workdir=w --table_optimizer=adamm", "choose one of sgd, momentum"),
        Case("train --data_dir=data --workdir=w --table_optimizer=adam,beta=1", "its options: b1, b2, eps, correct_by"),
        Case("train --data_dir=data --workdir=w --tables=nope.json", "--tables=nope.json: No such file"),
        Case(
            "train --data_dir=data --workdir=w --tables=nobody_table.json", "is not in the data, which has item, user"
        ),
        Case("train --data_dir=data --workdir=w --tables=nobody.json", "is 'row_wise'; expected names with values"),
        Case("train --data_dir=data --workdir=w --lr_plateau=factor:2", "lr_plateau=factor:2: factor is 2.0; it must"),
        Case("tune --data_dir=data --workdir=w --search=nope.yaml", "--search=nope.yaml"),
        Case("tune --data_dir=data --workdir=w --search=list.json", "unknown tables; known are method"),
        Case("tune --data_dir=data --workdir=w --search=no_search.yaml", "'learning_rat' is not a flag of training"),
        Case("tune --data_dir=data --search=search.yaml", "--workdir is missing"),
        Case(
            "train --data_dir=data --workdir=w --compress_tables=squeeze", "choose one of qr, modulo, two_hashes, mixed"
        ),
        Case("train --data_dir=data --workdir=w --lerning_rate=0.1", "Unknown command line flag"),
        Case("train --data_dir=data --workdir=w --seed=9223372036854775808", "must be below 2^63"),
        Case("train --data_dir=data --workdir=w --mesh=data:2,model:4", "JAX_NUM_CPU_DEVICES=8"),
        Case("train --data_dir=data --workdir=w --mesh=rows:2", "is not data:N or model:N"),
        Case("train --data_dir=data --workdir=w --sharding_plan=nope.json", "--sharding_plan"),
        Case("train --data_dir=data --workdir=w --sharding_plan=list.json", "is not a sharding plan"),
        Case("train --data_dir=data --workdir=w --sharding_plan=nobody.json", "nobody, which the model does not have"),
        Case("train --data_dir=data --workdir=w --num_processes=2", "go together"),
        Case("JAX_NUM_CPU_DEVICES=2 train --data_dir=data --workdir=w --kernels=native", "works on one device"),
        Case("train --data_dir=data --workdir=w --kernels=pallas", "is for GPUs; tables are on a cpu here"),
        Case("plan --flagfile=kaggle.flags --hardware=gpu", "--hardware=gpu is not known"),
        Case("plan --flagfile=kaggle.flags --topology=v5e:8", "--topology=v5e:8"),
        Case("benchmark --seconds=inf", "never ends"),
        Case("benchmark --sweep_values=1,2", "--sweep"),
        Case("benchmark --input --sweep=batch", "--input measures no step, so --sweep has nothing to show"),
        Case("serve --model=models/mine --batch_sizes=0", "at least one row"),
    ),
    "Judging a model": (
        Case("evaluate --workdir=runs/mine --group_by=session", "mine has no column 'session', it has user, item"),
        Case("evaluate --workdir=runs/mine --slice_by=user,colour", "--slice_by=colour: mine has no column"),
        Case("evaluate --workdir=runs/mine --group_by=user --columns_from=runs", "runs is no prepared dataset"),
        Case("evaluate --workdir=runs/mine --slice_by=user,user", "names a column twice"),
        Case("evaluate --workdir=runs/mine --max_slices=5", "has no effect without --slice_by"),
        Case("evaluate --workdir=runs/mine --slice_by=user --max_slices=1", "it must be at least 2"),
        Case("evaluate --workdir=runs/mine --bootstrap=10", "at least 40 resamples"),
        Case("evaluate --workdir=runs/mine --bootstrap=1000 --confidence=95", "a share between 0 and 1"),
        Case("evaluate --workdir=runs/mine --confidence=0.9", "has no effect without --bootstrap"),
        Case("evaluate --workdir=runs/mine --importance_repeats=3", "has no effect without --importance"),
        Case("evaluate --workdir=runs/mine --importance --importance_rows=1", "--importance_rows=1"),
        Case("evaluate --workdir=runs/mine --compare=nope", "--compare=nope is no workdir of a training run"),
        Case("evaluate --workdir=runs/mine --compare=runs/planted", "its test split has other rows"),
        Case("evaluate --workdir=runs/mine --plots=log.csv", "--plots=log.csv"),
        Case("evaluate --workdir=runs/mine --json=nodir/x.json", "--json=nodir/x.json"),
        Case("evaluate --workdir=runs/mine --seed=-1", "--seed=-1"),
        Case("train --data_dir=data --workdir=runs/mine --num_seeds=2", "holds a run of one seed"),
        Case("train --data_dir=data --workdir=w --num_seeds=0", "--num_seeds=0; it must be at least 1"),
    ),
    "What does not fit": (
        Case(
            "train --dataset=synthetic --table_sizes=2000000000 --workdir=w --embedding_dim=128 --bottom_mlp=128",
            "most of it is tables",
        ),
        Case("train --dataset=synthetic --table_sizes=3000000000 --workdir=w", "at most 2147483647"),
        Case(
            "benchmark --dataset=synthetic --table_sizes=2000000000 --embedding_dim=128 --bottom_mlp=128",
            "--allow_oversubscription",
        ),
        Case(
            "plan --dataset=synthetic --table_sizes=2000000000 --devices=1 --hardware=h100",
            "more than the",
        ),
        Case(
            "train --dataset=synthetic --table_sizes=40000000 --multi_hot=compatible --multi_hot_sizes=999 --workdir=w",
            "--multi_hot=virtual",
        ),
    ),
}


def make_scratch(directory: pathlib.Path) -> None:
    """Fill a directory with what the commands of CASES work on."""
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in (
        "prepare --input=log.csv --output=data --schema=mine.yaml",
        f"train --data_dir=data --workdir=runs/mine --num_epochs=2 {SMALL}",
        f"train --num_examples=500 --num_steps=1 --workdir=runs/planted {SMALL}",
        "export --workdir=runs/mine --out=models/mine",
    ):
        finished = run(directory, command)
        if finished.returncode:
            raise RuntimeError(f"{command}: {finished.stderr}")


def run(directory: pathlib.Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of CASES in the scratch directory, on one CPU device."""
    words = shlex.split(command)
    settings = dict(word.split("=", 1) for word in words if re.match("[A-Z_]+=", word))
    module, *flags = words[len(settings) :]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | settings
    return subprocess.run(
        [sys.executable, "-m", f"dlrm_jax.{module}", *flags],
        cwd=directory,
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )


def last_line(finished: subprocess.CompletedProcess[str]) -> str:
    """What the command ended with, on stderr."""
    return (finished.stderr.strip().splitlines() or [""])[-1]


def main() -> None:
    """Run all cases and write the table."""
    lines = []
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        make_scratch(scratch)
        for area, cases in CASES.items():
            lines += [f"\n## {area}\n", "| `python -m dlrm_jax.` | exit | printed |", "|---|---|---|"]
            for case in cases:
                finished = run(scratch, case.command)
                printed = re.sub(r"\|", r"\\|", last_line(finished).replace(str(scratch), "."))
                lines.append(f"| `{case.command}` | {finished.returncode} | {printed} |")
                print(lines[-1], flush=True)
    count = sum(map(len, CASES.values()))
    head = f"# {count} wrong uses, and what is printed\n\nEach ends in one line and an exit status other than 0.\n"
    made = f"\nMade {datetime.date.today()}, Python {platform.python_version()}; `python experiments/wrong_uses.py`.\n"
    TABLE.write_text(head + "\n".join(lines) + "\n" + made)


if __name__ == "__main__":
    main()
