"""A job with every default filled in, as it is written to `job.yaml` and to checkpoints."""

from __future__ import annotations

from vaedist.config.job import Job, Monitor
from vaedist.config.settings import parse
from vaedist.core.errors import UserError
from vaedist.data.loading.order import default_lanes
from vaedist.evaluation.metrics.features import default_extractor
from vaedist.evaluation.metrics.sample_metrics import SAMPLE_METRICS, base_name, is_sample_metric
from vaedist.models.contract import model_config


def resolved(job: Job) -> Job:
    """The job with every default filled in: the variant's settings, the lanes, the chosen weights. Idempotent."""
    content = job.model_dump(mode="json")
    content["model"] = model_config(job.model, f"job {job.name!r}").model_dump(mode="json")
    content["data"]["lanes"] = job.data.lanes or default_lanes(job.train.batch_size)
    content["train"]["weights"] = job.train.chosen_weights
    content["train"]["monitor"]["metric"] = _monitor(job.train.monitor)
    return parse(Job, content, where="the resolved job")


def _monitor(monitor: Monitor) -> str:
    """The monitored metric; a measure of sample quality with the extractor's hash, without which it means nothing.

    Raises:
        UserError: `mode` says the wrong way of such a measure.
    """
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
