"""What tests share: one Ray cluster for the session, the folder of real images."""
from __future__ import annotations

import os
from pathlib import Path

import pytest


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

    with ray_session(RunSettings()):
        yield
