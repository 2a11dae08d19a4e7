"""FuxiCTR's own models with the published recipes on Frappe; compare_quality.py runs this in an environment of its own.

`python fuxictr_frappe.py MODEL FRAPPE ZOO OUT EPOCHS`: MODEL is DLRM or DCNv2, of the checkout ZOO; FRAPPE holds
train.csv, valid.csv, test.csv. Writes OUT/MODEL.json: seconds of each epoch's training, without its validation, and the
metrics of the best epoch. EPOCHS 0 is the whole recipe, which stops by validation.
"""

import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import time

COLUMNS = ("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
COMMON = {
    **{"loss": "binary_crossentropy", "task": "binary_classification", "optimizer": "adam", "learning_rate": 1e-3},
    **{"metrics": ["AUC", "logloss"], "monitor": "AUC", "monitor_mode": "max", "early_stop_patience": 2},
    **{"batch_size": 4096, "embedding_dim": 10, "batch_norm": True, "net_regularizer": 0, "shuffle": True},
    **{"save_best_only": True, "num_workers": 3, "verbose": 0, "gpu": -1, "data_format": "csv", "seed": 2021},
}
RECIPES = {
    "DLRM": {
        **{"interaction_op": "cat", "embedding_regularizer": 0.1, "bottom_mlp_units": None},
        **{"top_mlp_units": [400, 400, 400], "top_mlp_activations": "ReLU", "top_mlp_dropout": 0.4},
    },
    "DCNv2": {
        **{"model_structure": "parallel", "use_low_rank_mixture": False, "num_cross_layers": 4, "net_dropout": 0.4},
        **{"parallel_dnn_hidden_units": [400, 400, 400], "dnn_activations": "ReLU", "embedding_regularizer": 0.05},
    },
}
"""github.com/reczoo/BARS: ranking/ctr/DLRM/DLRM_frappe_x1 and ranking/ctr/DCNv2/DCNv2_frappe_x1."""


def settings_of(name: str, frappe: pathlib.Path, out: pathlib.Path) -> dict:
    """What FuxiCTR's commands read from two YAML files."""
    return {
        **COMMON,
        **RECIPES[name],
        **{"model": name, "model_id": name, "dataset_id": "frappe", "data_root": str(out), "model_root": str(out)},
        **{f"{split}_data": str(frappe / f"{split}.csv") for split in ("train", "valid", "test")},
        "feature_cols": [{"name": list(COLUMNS), "active": True, "dtype": "str", "type": "categorical"}],
        "label_col": {"name": "label", "dtype": "float"},
        "min_categr_count": 1,
    }


def class_of(name: str, zoo: pathlib.Path) -> type:
    """A model of FuxiCTR's zoo, which its package does not carry."""
    spec = importlib.util.spec_from_file_location(name, zoo / "model_zoo" / name / "src" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def timed(model_class: type) -> type:
    """The same model, which notes how long each epoch and each validation takes."""

    class Timed(model_class):
        def train_epoch(self, *inputs) -> None:
            self.validating, start = 0.0, time.perf_counter()
            super().train_epoch(*inputs)
            self.__dict__.setdefault("seconds", []).append(time.perf_counter() - start - self.validating)

        def eval_step(self) -> None:
            start = time.perf_counter()
            super().eval_step()
            self.validating += time.perf_counter() - start

    return Timed


def main(name: str, frappe: str, zoo: str, out: str, epochs: str) -> None:
    """As model_zoo/*/run_expid.py does."""
    from fuxictr.features import FeatureMap
    from fuxictr.preprocess import FeatureProcessor, build_dataset
    from fuxictr.pytorch.dataloaders import RankDataLoader
    from fuxictr.pytorch.torch_utils import seed_everything

    directory = pathlib.Path(out)
    settings = settings_of(name, pathlib.Path(frappe), directory)
    seed_everything(seed=settings["seed"])
    paths = build_dataset(FeatureProcessor(**settings), **settings)
    settings |= dict(zip(("train_data", "valid_data", "test_data"), paths, strict=True))
    feature_map = FeatureMap("frappe", str(directory / "frappe"))
    feature_map.load(str(directory / "frappe" / "feature_map.json"), settings)
    model = timed(class_of(name, pathlib.Path(zoo)))(feature_map, **settings)
    train, valid = RankDataLoader(feature_map, stage="train", **settings)
    model.fit(train, validation_data=valid, epochs=int(epochs) or 100, **settings)
    found = {"seconds": model.seconds, "parameters": sum(weights.numel() for weights in model.parameters())}
    found["versions"] = {package: importlib.metadata.version(package) for package in ("fuxictr", "torch", "polars")}
    if not int(epochs):
        test = RankDataLoader(feature_map, stage="test", **settings)
        for split, rows in (("val", valid), ("test", test)):
            metrics = model.evaluate(rows)
            found[split] = {"auc": metrics["AUC"], "log_loss": metrics["logloss"]}
    (directory / f"{name}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
