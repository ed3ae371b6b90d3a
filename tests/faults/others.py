"""`vaedist-train` on a private cluster of three CPUs, some of which others have reserved; a test says how many.

Ray Train shares a cluster with others (further runs, Ray Data) through a coordinator that grants reservations in the
order in which they were first made. Here a reservation is made before the run's, and changed to the number of CPUs in
the file `WITNESS/others` whenever that changes; `WITNESS/reserved` then holds it too.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from vaedist.launchers.ray.cluster import cluster
from vaedist.train import main


def follow(folder: Path) -> None:
    import ray
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        ResourceRequestPriority,
        get_or_create_autoscaling_coordinator,
    )

    coordinator, wanted, reserved = get_or_create_autoscaling_coordinator(), folder / "others", -1
    while True:
        if (number := int(wanted.read_text())) != reserved:
            granted = coordinator.request_resources.remote(
                requester_id="others",
                resources=[{"CPU": 1}] * number,
                expire_after_s=36_000,
                priority=ResourceRequestPriority.HIGH,
            )
            ray.get(granted)
            reserved = number
            (folder / "reserved").write_text(str(number))
        time.sleep(0.5)


if __name__ == "__main__":
    place = Path(os.environ["WITNESS"])
    with cluster(cpus=3):
        threading.Thread(target=follow, args=(place,), daemon=True).start()
        while not (place / "reserved").exists():
            time.sleep(0.1)
        raise SystemExit(main(sys.argv[1:]))
