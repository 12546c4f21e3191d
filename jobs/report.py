"""Write the page about the last training."""
from __future__ import annotations

from pathlib import Path

from jobs.common import find_checkpoint, job, ray_session


@job("detr report")
def main(settings, store: Path) -> dict:
    """Write one self-contained HTML page about the last training in this store."""
    from pipelines.workflow import check_tracking, evaluate_stage, find_data, last_verdict, latest, report_stage

    check_tracking(settings, store)
    of_dataset = find_checkpoint(settings, store, None)
    read = find_data(settings, store)
    with ray_session(settings):
        data = read()
        checkpoint, _ = of_dataset(data)
        splits = [s for s in ("val", "test") if s in data["result"]["images"]]
        evaluations = [evaluate_stage(settings, store, data, checkpoint, s) for s in splits]
        training, predictions, trials = (latest(store, stage) for stage in ("train", "predict", "sweep"))
        if trials and trials["inputs"]["dataset"] != data["result"]["digest"]:
            trials = None
        stages = [stage for stage in (data, trials, training, *evaluations, predictions) if stage]
        verdict = last_verdict(settings, store, data, checkpoint)
        record = report_stage(settings, store, data, stages, training, evaluations, verdict, predictions)
    return {**record["result"], "reused": record["reused"], "text": record["result"]["report"]}


if __name__ == "__main__":
    main()
