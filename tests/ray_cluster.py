"""A real Ray cluster of several nodes on loopback, in processes of its own, that only holders of its token can use."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else Ray puts the machine's address in the place of 127.0.0.1


OF_NODES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # Ray's workers wait for all others by default


class RayCluster:
    """Nodes with the CPUs that `cpus` says, the first of them the head. `environment` is what a driver needs."""

    def __init__(self, *cpus: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # its sockets' paths must be short
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} | ON_LOOPBACK
        self.child = subprocess.Popen(
            [sys.executable, __file__, *map(str, cpus)],
            env=os.environ | self.environment | OF_NODES | {"RAY_TMPDIR": str(self.folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.environment["RAY_ADDRESS"] = self._said("at ")

    def remove_node(self) -> None:
        """Kills the last node with all its workers; returns when the cluster knows that it is gone."""
        assert self.child.stdin
        self.child.stdin.write("remove\n")
        self.child.stdin.flush()
        self._said("removed")

    def close(self) -> None:
        assert self.child.stdin
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()
        try:
            self.child.wait(60)
        finally:
            self.child.kill()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _said(self, start: str) -> str:
        assert self.child.stdout and self.child.stderr
        for line in self.child.stdout:
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise AssertionError(self.child.stderr.read()[-2000:])


@contextlib.contextmanager
def ray_cluster(*cpus: int) -> Iterator[RayCluster]:
    cluster = RayCluster(*cpus)
    try:
        yield cluster
    finally:
        cluster.close()


def _serve(cpus: list[int]) -> None:
    from ray.cluster_utils import Cluster

    where = {"node_ip_address": "127.0.0.1", "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], "include_dashboard": False, **where})
    nodes = [cluster.add_node(num_cpus=count, **where) for count in cpus[1:]]
    try:
        print(f"at {cluster.address}", flush=True)
        for _ in sys.stdin:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            print("removed", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    _serve([int(word) for word in sys.argv[1:]])
