"""Look at what a run would use before it starts, and say what would hurt."""
from __future__ import annotations

from collections import Counter

from jobs.common import DONE, FAILED, job, table_text


@job("detr doctor --config run.yaml cluster.address=10.0.0.5:6379 tracking.uri=https://mlflow.example.org",
     opens_store=False)  # fmt: skip
def main(settings, store: str) -> dict:
    """Look at what a run with these settings would use: Ray and its token, State API, job agent and room, storage,
    MLflow, clocks, GPUs, disks, versions and open ports. It takes less than a minute, whatever hangs. What it writes to
    storage goes again. The exit code is 1 if something is wrong; warnings are not."""
    from pipelines.doctor import findings_table, look_around
    from pipelines.findings import WARNING, WRONG
    from pipelines.progress import console

    with console.status("Looking at Ray, storage, MLflow and this machine"):
        findings = look_around(settings, store)
    counts = Counter(finding.verdict for finding in findings)
    return {
        "exit_code": FAILED if counts[WRONG] else DONE,
        "wrong": counts[WRONG],
        "warnings": counts[WARNING],
        "findings": [finding.model_dump() for finding in findings],
        "page": f"{table_text(findings_table(findings))}\nWrong: {counts[WRONG]}. Warnings: {counts[WARNING]}.",
    }


if __name__ == "__main__":
    main()
