"""The Ray launcher: Ray finds the nodes and holds them; one quiet actor a node keeps the same agent as everywhere.

Every worker decodes this file's config, and a worker never imports Ray: so Ray is imported where it is first used.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, final

from farspan.launch.agent import Spec
from farspan.launch.exit import Exit, NodeExit
from farspan.launch.on_local import LocalNode, Node, NodeLost, Placement, check, free_port

_ROOMS = ("kernels", "parallel", "models", "platform", "launch")
_QUIET = {
    "PYTHONSAFEPATH": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # an actor without GPUs must not hide them from its ranks
}
_ANSWER = 60.0  # seconds an actor gets for a plain question
_PLACE = 600.0  # seconds a joined cluster gets to find the nodes
_REAPED = 3.0  # seconds that Ray's own reaper gets, of which it takes one
_SOCKET_PATH = 107 - 75  # bytes of a Unix socket's path, less what Ray appends to its folder


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Run on a Ray cluster: the one at `address`, else a private one on this machine that ends with the run.

    `nodes` machines with `ranks` processes each (auto: one a GPU of this machine, else 1). `retries`: restarts without
    progress; `threads`: of a rank, auto shares the cores; `timeout`: age in seconds at which a heartbeat is too old;
    `grace`: seconds that ranks get to save when they are stopped;
    `object_store_mb`: of a private Ray. The nodes of a joined cluster share the file system of the run folder.
    """

    nodes: int = 1
    ranks: int | Literal["auto"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the ranks compute; auto: on GPUs where this machine has them."""
    address: str | None = None
    retries: int = 3
    threads: int | Literal["auto"] = "auto"
    timeout: float = 600
    grace: float = 120
    object_store_mb: int = 100

    def __post_init__(self) -> None:
        check(ranks=self.ranks, retries=self.retries, threads=self.threads, timeout=self.timeout, grace=self.grace)
        if self.nodes < 1:
            raise ValueError(f"nodes={self.nodes}: give at least one")
        if self.nodes > 1 and self.address is None:
            raise ValueError(f"nodes={self.nodes}: a private Ray has one node; give the address of a cluster")
        if self.address not in (None, "auto") and not re.fullmatch(r"[^/]+:[0-9]+", self.address or ""):
            raise ValueError(f"address={self.address}: give the cluster's host:port, or auto on one of its machines")
        if self.object_store_mb < 80:
            raise ValueError(f"object_store_mb={self.object_store_mb}: Ray needs at least 80")


@contextmanager
def placed(config: Ray, *, ranks: int, cuda: bool, say: Callable[[str], None]) -> Iterator[Placement]:
    """One actor on each of `config.nodes` nodes; all of it is gone when the context closes, a joined cluster stays.

    Raises ValueError when driver and nodes run different code, TimeoutError when the cluster has no room, and
    ConnectionError when there is no cluster at the address.
    """
    # Of the moment at which the source is shipped: who edits a checkout during a run must not end it at a restart.
    # A private Ray runs on the same files as we do, so that there is nothing to compare.
    here = None if config.address is None else versions()
    with ExitStack() as stack:
        stack.enter_context(_private(config, ranks, cuda) if config.address is None else _joined(config.address))
        cluster = _Cluster(config, gpus=ranks if cuda else 0, versions=here)
        stack.callback(cluster.close)
        cluster.place(say)
        yield Placement(cluster.nodes(), cluster.restore)


@contextmanager
def _private(config: Ray, ranks: int, cuda: bool) -> Iterator[None]:
    folder = _short_folder()
    with _swept(folder), _environment({**_QUIET, "RAY_AUTH_MODE": "disabled"}):
        import ray

        try:
            ray.init(
                address="local",
                num_cpus=max(1, ranks),
                num_gpus=_gpus() if cuda else 0,
                object_store_memory=config.object_store_mb * 2**20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _node_ip_address="127.0.0.1",  # nothing outside this machine may reach a Ray without a password
                _temp_dir=folder,
            )
            yield
        finally:
            ray.shutdown()


@contextmanager
def _joined(address: str) -> Iterator[None]:
    host, _, port = address.rpartition(":")
    if host:  # Ray would try for minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(f"launch.address={address}: no Ray cluster answers there ({error})") from error
    with _environment(_QUIET):
        import ray

        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"py_modules": [str(source())], "env_vars": _QUIET},
            )
            yield
        finally:
            ray.shutdown()


@final
class _Cluster:
    """The placement group and its actors, one a bundle."""

    def __init__(self, config: Ray, *, gpus: int, versions: Mapping[str, str] | None) -> None:
        from ray.util.placement_group import placement_group

        self._config = config
        self._versions = versions
        self._bundle = {"CPU": 1, **({"GPU": gpus} if gpus else {})}
        strategy = "STRICT_SPREAD" if config.nodes > 1 else "PACK"
        self._group = placement_group([self._bundle] * config.nodes, strategy=strategy)
        self._actors: list[Any] = []
        self._returning: dict[int, Any] = {}

    def place(self, say: Callable[[str], None]) -> None:
        import ray
        from ray.exceptions import RayError

        want = f"{self._config.nodes} nodes with {self._bundle} each"
        deadline = time.monotonic() + _PLACE
        if not self._group.wait(timeout_seconds=5):
            say(f"waiting for {want}; the cluster has {_resources()}")
            while not self._group.wait(timeout_seconds=5):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no room for {want} within {_PLACE:g} s; the cluster has {_resources()}")
        self._actors = [self._actor(index) for index in range(self._config.nodes)]
        try:
            described = ray.get([actor.describe.remote() for actor in self._actors], timeout=2 * _ANSWER)
        except RayError as error:
            raise ConnectionError(f"Ray could not start an actor on each node: {error}") from error
        for there, address in described:
            compare(self._versions or there, there, address)

    def nodes(self) -> list[Node]:
        return [self._node(actor) for actor in self._actors]

    def restore(self, index: int) -> Node | None:
        """A new actor in the bundle of a lost one, which Ray places anew where its node is gone."""
        import ray
        from ray.exceptions import RayActorError

        if index not in self._returning:
            ray.kill(self._actors[index])
            self._actors[index] = self._actor(index)
            self._returning[index] = self._actors[index].describe.remote()
        if not ray.wait([self._returning[index]], timeout=0)[0]:
            return None
        try:
            there, address = ray.get(self._returning.pop(index))
        except RayActorError:
            return None  # lost again on its way up: the next call makes another
        compare(self._versions or there, there, address)
        return self._node(self._actors[index])

    def close(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)

    def _actor(self, index: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        options = ray.remote(Host).options(
            num_cpus=1, num_gpus=self._bundle.get("GPU", 0), max_restarts=0, scheduling_strategy=place
        )
        return options.remote()

    def _node(self, actor: Any) -> Node:
        return RayNode(actor, alone=self._config.nodes == 1)


@final
class Host:
    """What runs in the actor: quick answers only. Ray runs it in the process's main thread, which the agent needs."""

    def __init__(self) -> None:
        self._node = LocalNode()

    def describe(self) -> tuple[dict[str, str], str]:
        return versions(), self.address()

    def address(self) -> str:
        import ray

        address: str = ray.util.get_node_ip_address()
        return address

    def free_port(self) -> int:
        return free_port()

    def start(self, spec: Spec) -> None:
        self._node.start(spec)

    def poll(self) -> NodeExit | None:
        return self._node.poll()

    def signal(self, number: int) -> None:
        self._node.signal(number)

    def kill(self) -> None:
        self._node.kill()


@final
class RayNode:
    """A `Node` behind an actor. No call but address and free_port waits for an answer."""

    def __init__(self, actor: Any, *, alone: bool) -> None:
        self._actor = actor
        self._alone = alone
        self._asked: Any = None
        self._told: NodeExit | None = NodeExit(code=Exit.RETRY, reason="its agent was never started")

    @property
    def address(self) -> str:
        # Ranks that have only each other need no route to the outside, which a laptop may lose or hide behind a VPN.
        return "127.0.0.1" if self._alone else str(self._ask(self._actor.address.remote()))

    def free_port(self) -> int:
        return int(self._ask(self._actor.free_port.remote()))

    def start(self, spec: Spec) -> None:
        self._told, self._asked = None, self._actor.start.remote(spec)

    def poll(self) -> NodeExit | None:
        import ray
        from ray.exceptions import RayTaskError

        if self._told is None:
            self._asked = self._asked or self._actor.poll.remote()
            if ray.wait([self._asked], timeout=0)[0]:
                asked, self._asked = self._asked, None
                try:
                    self._told = self._ask(asked)
                except RayTaskError as error:
                    self._told = NodeExit(code=Exit.RETRY, reason=f"its agent did not start: {error.cause}")
        return self._told

    def signal(self, number: int) -> None:
        self._actor.signal.remote(number)

    def kill(self) -> None:
        self._actor.kill.remote()

    def _ask(self, reference: Any) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        try:
            return ray.get(reference, timeout=_ANSWER)
        except (RayActorError, GetTimeoutError) as error:
            raise NodeLost(str(error).strip().splitlines()[0]) from error


def versions() -> dict[str, str]:
    """What driver and nodes must have in common; of farspan the source itself, since checkouts share a number."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for room in _ROOMS for path in (root / room).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return {
        "farspan": f"source {digest.hexdigest()[:12]}",
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
    }


def compare(here: Mapping[str, str], there: Mapping[str, str], address: str) -> None:
    """Raises ValueError naming every difference between the driver's and a node's versions."""
    differences = [f"{name} is {here[name]} here and {there[name]} there" for name in here if here[name] != there[name]]
    if differences:
        raise ValueError(f"node {address} runs other code: {'; '.join(differences)}; install the same on every node")


def source() -> Path:
    """The folder that ships farspan to a cluster: the links of a checkout, else the installed package."""
    root = Path(__file__).parents[1]
    links = root / ".ci" / "farspan"
    return links if links.is_dir() else root


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Ray reads its settings from the environment, its processes inherit them, and it adds some: all is put back."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _swept(folder: str) -> Iterator[None]:
    """Remove a private Ray's folder at the end, by a process of its own if this one is killed.

    Ray's reaper then ends most of Ray, but two of its helpers would wait a minute for servers that are gone.
    """
    sweeper = subprocess.Popen(
        [sys.executable, "-m", "farspan.launch.on_ray", folder],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield
    finally:
        sweeper.kill()
        sweeper.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: str) -> None:
    """Once standard input ends: kill what still has a file open in a private Ray's folder, then remove the folder."""
    sys.stdin.read()
    time.sleep(_REAPED)
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(file.readlink().is_relative_to(folder) for file in (entry / "fd").iterdir()):
                os.kill(int(entry.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _short_folder() -> str:
    parent = tempfile.gettempdir()
    if len(parent.encode()) + len("/ray-12345678") > _SOCKET_PATH:
        parent = "/tmp"  # Ray puts Unix sockets in it, whose paths the kernel limits
    return tempfile.mkdtemp(prefix="ray-", dir=parent)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _resources() -> str:
    import ray

    total = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    return f"{nodes} nodes, {total.get('CPU', 0):g} CPU, {total.get('GPU', 0):g} GPU"


if __name__ == "__main__":
    sweep(sys.argv[1])
