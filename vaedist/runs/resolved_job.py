"""A job with every default filled in, as it is written to `job.yaml` and to checkpoints."""

from __future__ import annotations

from vaedist.config.job import Job, Monitor
from vaedist.core.errors import UserError
from vaedist.data.loading.order import default_lanes
from vaedist.evaluation.metrics.features import default_extractor
from vaedist.evaluation.metrics.sample_metrics import SAMPLE_METRICS, base_name, is_sample_metric


def resolved(job: Job) -> Job:
    """The job with the lanes, the chosen weights and the metric's extractor filled in. Idempotent.

    Raises:
        UserError: `monitor.mode` says the wrong way of a measure of sample quality.
    """
    data = {"lanes": job.data.lanes or default_lanes(job.train.batch_size)}
    monitor = job.train.monitor.model_copy(update={"metric": _metric(job.train.monitor)})
    train = {"weights": job.train.chosen_weights, "monitor": monitor}
    return job.model_copy(
        update={"data": job.data.model_copy(update=data), "train": job.train.model_copy(update=train)}
    )


def _metric(monitor: Monitor) -> str:
    """The monitored metric; a measure of sample quality with the extractor's hash, without which it means nothing."""
    metric = monitor.metric
    if not is_sample_metric(metric):
        return metric
    better = SAMPLE_METRICS[base_name(metric)]
    if monitor.mode != better:
        raise UserError(
            f"train.monitor.mode is {monitor.mode!r}, but of {base_name(metric)} the {better}imum is best: set "
            f"train.monitor.mode={better}"
        )
    return metric if metric != base_name(metric) else f"{metric}[{default_extractor().label}]"
