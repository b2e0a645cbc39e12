"""Many trials, several at once: every point, before and after, by both roles."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from faults.points import ACTIONS, POINTS, WHENS, Fault
from faults.trial import Trial

ROLES = ("listener", "connector")
ATTEMPTS = 4
# How often a point is passed in a short talk; the fault comes at a random one of these times.
OFTEN = {"lock": 40, "unlock": 40}
SELDOM = {
    **dict.fromkeys(("attach", "create", "publish", "join", "leave", "remove", "expel"), 1),
    **dict.fromkeys(("sweep", "unlink", "connect", "detach", "copy-out", "commit"), 3),
    **dict.fromkeys(("send-pieces", "take-piece"), 3),
}
# Nothing but our own threads does these, on nobody's behalf, or no connection is there yet.
NO_TASK = ("leave", "remove", "unlink", "release", "detach", "sweep", "expel", "attach", "create")
NO_TASK += ("publish", "join", "lock", "unlock")
NO_COMM = ("attach", "create", "publish", "join", "remove")


@dataclass(frozen=True)
class Job:
    """One fault to be met, and where the pool's folder goes."""

    point: str
    when: str
    action: str
    role: str
    seed: int
    base: str
    until: float = math.inf  # on the monotonic clock, which is one for all processes


def plan(kills: int, others: int, seed: int, base: str) -> list[Job]:
    """List jobs: at least `kills` kills spread evenly, and each other fault `others` times."""
    places = list(itertools.product(POINTS, WHENS, ROLES))
    jobs = []
    for action in ACTIONS:
        left_out = {"cancel": NO_TASK, "cut": NO_COMM}.get(action, ())
        here = [place for place in places if place[0] not in left_out]
        repeats = -(-kills // len(here)) if action == "kill" else others
        jobs += [(*place, action) for place in here for _ in range(repeats)]
    order = random.Random(seed)
    order.shuffle(jobs)
    return [
        Job(point, when, action, role, (seed << 24) + number, base)
        for number, (point, when, role, action) in enumerate(jobs)
    ]


def perform(job: Job) -> dict[str, Any] | None:
    """Run a job; again, with an earlier occurrence, while the point was not reached.

    None if its time is over.
    """
    if time.monotonic() > job.until:
        return None
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # fork beside OpenBLAS's threads
    chooser = random.Random(job.seed)
    most = OFTEN.get(job.point) or SELDOM.get(job.point, 10)
    outcome = None
    for attempt in range(ATTEMPTS):
        fault = Fault(job.point, job.when, job.action, chooser.randint(1, most))
        outcome = Trial(fault, job.role, job.seed * ATTEMPTS + attempt, Path(job.base)).run()
        if outcome.reached or outcome.failed:
            break
        most = max(1, most // 3)
    assert outcome is not None
    return asdict(outcome)


def run(
    jobs: list[Job], at_once: int, told: Callable[[dict[str, Any]], None], seconds: float = 0.0
) -> list[dict[str, Any]]:
    """Run jobs, `at_once` at a time, all of them or for so long; `told` hears of each outcome."""
    outcomes = []
    if seconds:
        jobs = [replace(job, until=time.monotonic() + seconds) for job in jobs]
    context = multiprocessing.get_context("fork")
    with context.Pool(at_once) as processes:
        for outcome in processes.imap_unordered(perform, jobs):
            if outcome is not None:
                told(outcome)
                outcomes.append(outcome)
        processes.close()
        processes.join()
    return outcomes
