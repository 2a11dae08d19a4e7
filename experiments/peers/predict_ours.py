"""Milliseconds of one prediction of an exported model: `python experiments/peers/predict_ours.py DIR 1 64 2048`.

`--native`: by C++ (dlrm_jax/serving/artifact/native.py).
"""

import json
import sys
import time

import numpy as np

from dlrm_jax.serving.artifact.loaded import OneDevice, load
from dlrm_jax.serving.artifact.native import NativeCpu


def main() -> None:
    """As predict_torch.py, on the same rows."""
    arguments = sys.argv[1:]
    engine = NativeCpu if "--native" in arguments else OneDevice
    directory, *sizes = (argument for argument in arguments if argument != "--native")
    sizes = tuple(map(int, sizes))
    model = load(directory, batch_sizes=sizes, make_engine=engine)
    rng = np.random.default_rng(0)
    limits = [feature.rows for feature in model.signature.features]
    out = {}
    for size in sizes:
        dense = rng.normal(size=(size, len(model.signature.dense_names))).astype(np.float32)
        ids = rng.integers(0, limits, (size, len(limits))).astype(np.int32)
        times = []
        for _ in range(30 if size > 1000 else 300):
            start = time.perf_counter()
            probability = model.predict(dense, ids)
            times.append(time.perf_counter() - start)
        kept = np.array(times[len(times) // 10 :]) * 1e3
        out[size] = {
            "median_ms": float(np.median(kept)),
            "least_ms": float(kept.min()),
            "probability": probability[:8].tolist(),
        }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
