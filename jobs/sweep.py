"""Try matching costs and loss weights, judged by AP."""
from __future__ import annotations

from pathlib import Path

from jobs.common import job, ray_session


@job("detr sweep sweep.trials=8 sweep.budget='2 minutes'")
def main(settings, store: Path) -> dict:
    """Try the settings of sweep.space for a short time each and keep the best by AP as a settings file."""
    from pipelines.sweep import plan
    from pipelines.workflow import check_training, find_data, sweep_stage

    plan(settings)  # what cannot be tried is said before anything is done
    check_training(settings, store)
    read = find_data(settings, store)
    with ray_session(settings, dashboard=True):
        record = sweep_stage(settings, store, read())
    best = str(Path(record["folder"]) / "best.yaml")
    return {**record["result"], "best_config": best, "reused": record["reused"], "text": best}


if __name__ == "__main__":
    main()
