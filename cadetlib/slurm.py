"""A profile's notebooks as jobs of a Slurm cluster, through submitit (an optional extra: requirements-slurm.txt).

One job a notebook, begun when the jobs of those it needs have ended well (afterok) and cancelled when one has not. A job does
what `reproduce --only` does, with the same keys and marks: what is done and unchanged is skipped, and submitting once more goes
on where it stopped. A job at its time limit is requeued by submitit, a preempted one by Slurm; pretraining then saves, and goes
on from its checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cadetlib import checks, profiles, reproduce

_TIMEOUTS = 100  # time limits that a job is requeued after: 800 epochs take many


@dataclass(frozen=True)
class Request:
    """What a job asks of the cluster.

    >>> Request(gpus=1, cpus=8).options(processes=4)["slurm_gpus_per_node"]
    4
    """

    partition: str = ""  # empty: the cluster's default
    minutes: int = 1440
    gpus: int = 1  # of a notebook; one that starts more processes gets a GPU for each; 0: none
    cpus: int = 8  # for each GPU; without any, for the job

    def __post_init__(self) -> None:
        # submitit asks for a signal 90 s before the limit, Slurm may send it 60 s earlier: sooner than the job can listen.
        for name, least in (("minutes", 3), ("gpus", 0), ("cpus", 1)):
            checks.at_least(getattr(self, name), f"--slurm-{name}", least)

    def options(self, processes: int = 1) -> dict[str, Any]:
        """submitit's parameters for a notebook that starts so many processes."""
        gpus = max(self.gpus, processes) if self.gpus else 0
        chosen: dict[str, Any] = dict(timeout_min=self.minutes, nodes=1, tasks_per_node=1, cpus_per_task=self.cpus * max(1, gpus))
        if gpus:
            chosen["slurm_gpus_per_node"] = gpus
        if self.partition:
            chosen["slurm_partition"] = self.partition
        return chosen


@dataclass(frozen=True)
class NotebookJob:
    """What a job runs: one notebook of a profile, in the environment of the one who submitted it.

    >>> NotebookJob("no-such-profile", "00_setup")()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: profile: found 'no-such-profile', expected one of ...
    """

    profile: str
    name: str
    output: str = ""
    force: bool = False
    environment: tuple[tuple[str, str], ...] = ()

    def __call__(self) -> None:
        """Run it; RuntimeError when it failed, so that the jobs that need it do not begin.

        After an interruption (time limit, preemption, a node's failure) what --force was to redo is not begun once more.
        """
        os.environ.update(self.environment)
        force = self.force and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        if reproduce.run_job(self.profile, self.name, self.output, force):
            raise RuntimeError(f"{self.name} failed: what happened stands above and in its log")

    def checkpoint(self) -> Any:
        """submitit asks this when the job is to be requeued at its time limit."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    profile: str,
    selected: Sequence[profiles.Notebook],
    job: reproduce.Job,
    request: Request,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Submit the notebooks that are not done, in their order -> name and job id. ValueError without submitit or Slurm.

    A notebook is left out when it is done with its present key and nothing it needs was submitted; what is submitted decides
    again when its time has come.

    >>> submit("digits", [], reproduce.Job(Path(), Path(), "", "", None), Request())
    {}
    """
    ids: dict[str, str] = {}
    for notebook in selected:
        after = [ids[name] for name in notebook.needs if name in ids]
        if not after and _is_done(notebook, job):
            say(f"{notebook.name}  skipped, unchanged")
            continue
        executor = _executor(job, request, notebook, after)
        ids[notebook.name] = executor.submit(_job_of(profile, notebook, job)).job_id
        say(f"{notebook.name}  job {ids[notebook.name]}{', after ' + ', '.join(after) if after else ''}")
    if ids:
        say(f"\nlogs: {job.folder / 'slurm'}; squeue shows the jobs, and the same command submits again what did not end well")
    return ids


def _is_done(notebook: profiles.Notebook, job: reproduce.Job) -> bool:
    return reproduce.is_done(job.folder, notebook.name, reproduce.key_of(notebook, job.folder, job.library, job.data))


def _job_of(profile: str, notebook: profiles.Notebook, job: reproduce.Job) -> NotebookJob:
    given = {"CADET_ROOT": str(job.root)}
    if os.environ.get("CADET_DATA"):
        given["CADET_DATA"] = str(Path(os.environ["CADET_DATA"]).expanduser().absolute())
    return NotebookJob(profile, notebook.name, job.output, job.force, tuple(given.items()))


def _executor(job: reproduce.Job, request: Request, notebook: profiles.Notebook, after: Sequence[str]) -> Any:
    """submitit's executor with the parameters of one notebook."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError("--slurm: found no submitit, expected it: pip install -r requirements-slurm.txt") from error
    try:
        executor = submitit.AutoExecutor(folder=job.folder / "slurm", cluster="slurm", slurm_max_num_timeout=_TIMEOUTS)
    except RuntimeError as error:
        raise ValueError(f"--slurm: found no Slurm here ({error}), expected its commands sbatch and srun") from error
    dependency = dict(slurm_dependency=":".join(["afterok", *after])) if after else {}
    extra = {"kill-on-invalid-dep": "yes"} if after else {}  # else it would wait for ever when one of those fails
    options = request.options(notebook.processes)
    executor.update_parameters(name=f"cadet-{notebook.name}", **options, **dependency, slurm_additional_parameters=extra)
    return executor
