"""Milliseconds of one prediction by PyTorch: `python experiments/peers/predict_torch.py MODEL_DIR/1 1 64 2048`."""

import json
import os
import pathlib
import sys
import time

import numpy as np
import torch
from fastapi_torch import DLRM


def timed(model: DLRM, dense: np.ndarray, ids: np.ndarray, threads: int) -> list[float]:
    """Seconds of each prediction on so many threads."""
    torch.set_num_threads(threads)
    times = []
    for _ in range(30 if len(dense) > 1000 else 300):
        start = time.perf_counter()
        model(torch.from_numpy(dense), torch.from_numpy(ids)).numpy()
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    """Print {batch size: {"median_ms", "least_ms", "probability": the first ones}} as JSON.

    On one thread or on all, whichever is faster.
    """
    model = DLRM(pathlib.Path(sys.argv[1])).eval()
    rng = np.random.default_rng(0)
    limits = [feature["rows"] for feature in model.signature["features"]]
    out = {}
    with torch.inference_mode():
        for size in map(int, sys.argv[2:]):
            dense = rng.normal(size=(size, len(model.signature["dense_names"]))).astype(np.float32)
            ids = rng.integers(0, limits, (size, len(limits))).astype(np.int32)
            times = min((timed(model, dense, ids, threads) for threads in (1, os.cpu_count() or 1)), key=np.median)
            probability = model(torch.from_numpy(dense), torch.from_numpy(ids)).numpy()
            kept = np.array(times[len(times) // 10 :]) * 1e3
            out[size] = {
                "median_ms": float(np.median(kept)),
                "least_ms": float(kept.min()),
                "probability": probability[:8].tolist(),
            }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
