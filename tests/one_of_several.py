"""One of several processes that check placements together.

`python -m tests.one_of_several PORT NUMBER OF DEVICES SHARDING...`.
"""

import sys

import jax

from dlrm_jax.host import processes


def main() -> None:
    port, number, count, devices = map(int, sys.argv[1:5])
    jax.config.update("jax_num_cpu_devices", devices)
    processes.join(f"127.0.0.1:{port}", count, number)
    from tests.tables.placement_test import OPTIMIZERS, SHARDINGS, assert_equals_one_device, place
    from tests.training.hidden_test import BOTH, assert_close, in_top, trained, trained_alone

    total = count * devices
    for sharding in sys.argv[5:]:
        i = (*SHARDINGS, "mix").index(sharding)
        table = OPTIMIZERS[i % 3]
        mesh = (1, total) if i % 2 else (2, total // 2)
        assert_equals_one_device(place(mesh, sharding, table, capacity=2), table, weighted=True)
        print(f"{sharding} on {mesh} equals one device", flush=True)
    model = in_top(BOTH)
    assert_close(trained(model, total), trained_alone(model))
    print("with batch norm and dropout it equals one device", flush=True)


if __name__ == "__main__":
    main()
