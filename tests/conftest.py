"""What tests share: one Ray cluster, PostgreSQL and MLflow server for the session, the folder of real images."""
from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a script's background; tests start what is to hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # by nohup; nor that their terminal is closed
    signal.signal(signal.SIGHUP, lambda number, frame: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("before_ray") is None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images; it is not part of the repository."""
    folder = Path(os.environ.get("DETR_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the real images are not here (looked in {folder}; set DETR_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def ray_cluster():
    """The session's Ray."""
    from jobs.common import ray_session
    from pipelines.settings import RunSettings

    with ray_session(RunSettings(), dashboard=True):  # sweeps need it
        yield


@pytest.fixture(scope="session")
def postgres():
    """The URI of a database on a PostgreSQL of our own; `new_database` (mlflow_server.py) makes another beside it."""
    from mlflow_server import Postgres

    if reason := Postgres.unfit():
        pytest.skip(f"no PostgreSQL: {reason}")
    with Postgres() as server:
        yield server.uri


@pytest.fixture(scope="module")
def mlflow_server(postgres, tmp_path_factory):
    """An MLflow server with passwords, on PostgreSQL: its url, user and password, which the environment has, too.

    Of a module, since it takes a seventh of a core while nobody asks it anything.
    """
    from mlflow_server import MlflowServer

    if reason := MlflowServer.unfit():
        pytest.skip(f"no MLflow server: {reason}")
    with MlflowServer(tmp_path_factory.mktemp("mlflow"), postgres) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", server.user)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", server.password)
        yield server


class HostCopies(TorchFunctionMode):
    """Lists what would make a host wait for its device, every tensor standing for one on a device.

    Calls from Python (`cpu`, `numpy`, `tolist`) are seen here; values read by any other way, and sizes that depend
    on values, in the operations they end in. What `cpu` returns is on the host, as is what is marked `on_host` and
    what is computed from nothing else.
    """

    READS = (torch.Tensor.numpy, torch.Tensor.tolist)

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []
        self.operations = _ValueReads(self.seen)

    def __enter__(self):
        self.operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.operations.__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        said = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, str)]
        to_host = function is torch.Tensor.cpu or (function is torch.Tensor.to and "cpu" in said)
        if (to_host or function in self.READS) and not getattr(args[0], "on_host", False):
            self.seen.append(function.__name__)
        result = function(*args, **kwargs)
        given = [getattr(x, "on_host", False) for x in args if isinstance(x, torch.Tensor)]
        if isinstance(result, torch.Tensor) and (
            to_host or (given and all(given) and function is not torch.Tensor.to)
        ):
            result = result.detach()  # another object than what is on the device
            result.on_host = True
        return result


class _ValueReads(TorchDispatchMode):
    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "is_nonzero")

    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple) else ()
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if masked or (name.startswith(self.READS) and not getattr(args[0], "on_host", False)):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def host_copies() -> type[HostCopies]:
    """Counts copies from a device to the host, on the CPU."""
    x = torch.arange(3.0)
    with HostCopies() as copies:
        x[x > 1], x.sum().item(), bool(x.any()), x.cpu().numpy(), x.tolist(), x.nonzero(), float(x[0]), x.to("cpu")
    assert len(copies.seen) == 8, copies.seen
    return HostCopies
