"""Where a launch goes, and how: from its stages to batch scripts and lines of the launch's record."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from vaedist.config.site import Site
from vaedist.core.errors import UserError
from vaedist.slurm.chain import Stage
from vaedist.slurm.launch_record import LaunchedTask
from vaedist.slurm.script import BatchSpec, batch_script


@dataclass(frozen=True)
class LaunchConfig:
    """The launch folder, the site, and what the stages that train ask for.

    Attributes:
        folder: The launch folder; jobs read the copy of the site file in it.
        nodes, ranks_per_node, engine, time, max_parallel: As in `vaedist.slurm.script.BatchSpec`.
        python_folder: Put first in PATH where the site says nothing about Python; None: left alone.
    """

    folder: Path
    site: Site
    nodes: int = 1
    ranks_per_node: int | None = None
    engine: str | None = None
    time: str | None = None
    max_parallel: int | None = None
    python_folder: Path | None = None

    def batch_spec(self, stage: Stage) -> BatchSpec:
        """What sbatch is asked for, for one stage."""
        spec = BatchSpec(
            name=f"{self.folder.name}.{stage.name}",
            tasks=tuple(task.arguments for task in stage.tasks),
            log=str(self.folder / f"{stage.name}-{'%A_%a' if stage.is_array else '%j'}.log"),
            comment=f"vaedist:{self.folder}",
            time=self.time,
            max_parallel=self.max_parallel,
        )
        if stage.trains:
            return replace(spec, nodes=self.nodes, ranks_per_node=self.ranks_per_node, engine=self.engine)
        return replace(spec, gpus_per_node=None if self.site.gpu_syntax == "none" else 1)

    def script(self, stage: Stage) -> str:
        """The very text that sbatch gets for one stage."""
        if "%" in str(self.folder):
            raise UserError(
                f"sbatch would read the % in {self.folder} as a place to fill in: give another --folder"
            )
        alone = {"train": "train", "prior": "train", "tune": "tune"}.get(stage.name, "chain")
        template = "array" if stage.is_array else alone
        site_file = self.folder / "site.yaml"
        return batch_script(template, self.batch_spec(stage), self.site, site_file, self.python_folder)

    def launched(self, stage: Stage, number: str, after: str | None) -> list[LaunchedTask]:
        """The record of a stage that has been submitted.

        Args:
            number: Of its job; `after` is that of the job that it waits for, or None.
        """
        spec = self.batch_spec(stage)
        return [
            LaunchedTask(
                link=stage.name,
                label=task.label,
                job=f"{number}_{index}" if stage.is_array else number,
                executor="slurm",
                arguments=task.arguments,
                run=None if task.run is None else str(task.run.absolute()),
                log=spec.log.replace("%A", number).replace("%a", str(index)).replace("%j", number),
                after=after,
                mark=spec.comment,
                sent=time.time(),
            )
            for index, task in enumerate(stage.tasks)
        ]
