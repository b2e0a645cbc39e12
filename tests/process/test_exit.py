"""What a process does at its end: arrays keep their bytes, and files go with the last."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .deployment import Deployment, environment, run

# A handler that was registered before ours runs after it, and saves what a task returned.
SAVES = """
import atexit, sys
import numpy as np

result = None

def save():
    print("saved", sorted(set(result.tolist())), flush=True)

atexit.register(save)
from distributed import Client
client = Client(sys.argv[1])
result = client.submit(np.full, 1 << 20, 1, "u1").result()
futures = [client.submit(np.full, 1 << 20, value, "u1") for value in range(2, 30)]
client.gather(futures)
other = client.get_executor()  # traffic goes on while this process ends
for future in futures:
    future.add_done_callback(lambda f: None)
"""


def test_an_array_that_is_saved_at_exit(
    deployment: Deployment, pool_config: dict[str, Any]
) -> None:
    for _ in range(3):
        assert "saved [1]" in run(SAVES, deployment.address, config=pool_config)


ALONE = """
import numpy as np
from distributed import Client, LocalCluster

if __name__ == "__main__":
    cluster = LocalCluster(
        n_workers=1, protocol="shm", dashboard_address="127.0.0.1:0", memory_limit=0
    )
    client = Client(cluster)
    kept = client.submit(np.ones, 1 << 18).result()
    {ending}
"""


def test_the_last_process_removes_the_files_also_with_living_arrays(
    pool_config: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "pool"
    config = {**pool_config, "shm-bridge.pool.path": str(folder)}
    script = tmp_path / "script.py"
    for ending in ("pass", "client.close(); cluster.close()", "client.close()"):
        script.write_text(ALONE.format(ending=ending))
        subprocess.run(
            [sys.executable, str(script)],
            env=environment(config),
            check=True,
            timeout=100,
            capture_output=True,
        )
        assert os.listdir(folder) == ["lock"], ending
