"""What every engine's integration is made of: jobs that are checked, taken and released one by one."""

from __future__ import annotations

import importlib.metadata
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["active", "ready", "off", "unavailable"]


@dataclass(frozen=True)
class Status:
    """Where a job stands in this process, why, and what the reader can do about it.

    * ``active``: the engine calls Abiding.
    * ``ready``: it was chosen and its checks pass, but this process has not registered it.
    * ``off``: it was not chosen.
    * ``unavailable``: it was left to the engine.
    """

    state: State
    reason: str
    remedy: str = ""


class UnavailableError(Exception):
    """A job cannot be taken: ``reason`` says why, ``remedy`` what to do about it ("" if nothing can be done)."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


class Job(ABC):
    """One part of an engine that Abiding can take over.

    Invariant: :meth:`check` replaces nothing, and :meth:`release` leaves the engine as :meth:`take` found it.
    """

    name: str

    @abstractmethod
    def check(self) -> None:
        """Raise an :class:`UnavailableError` unless all that the job would replace is what it was written for."""

    @abstractmethod
    def take(self) -> str:
        """Put Abiding in place, after :meth:`check`; returns in a few words what the engine does from now on."""

    @abstractmethod
    def release(self) -> None:
        """Undo :meth:`take`."""


class Later(Job):
    """A job whose name is settled, and which this release does not have."""

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self) -> None:
        raise UnavailableError("not in this release")

    def take(self) -> str:
        raise NotImplementedError

    def release(self) -> None:
        raise NotImplementedError


class Engine:
    """The jobs of one engine.

    Args:
        name: the engine's distribution and package, such as "vllm".
        jobs: what can be chosen.
        how: what a user sets or calls to choose jobs, for remedies.
    """

    def __init__(self, name: str, jobs: Sequence[Job], *, how: str) -> None:
        self.name, self.how = name, how
        self.jobs = {job.name: job for job in jobs}
        # A child of the engine's own logger, so its level, format and destination apply.
        self.log = logging.getLogger(f"{name}.abiding")
        self._status: dict[str, Status] = {}

    def register(self, chosen: Iterable[str]) -> dict[str, Status]:
        """Take the chosen jobs and release the others; logs one line per job that changes, and never raises."""
        chosen = set(chosen)
        for name in sorted(chosen - set(self.jobs)):
            self.log.warning("abiding: there is no job %r; expected some of %s", name, ", ".join(self.jobs))
        for name, job in self.jobs.items():
            before = self._status.get(name)
            if name not in chosen:
                if before is not None and before.state == "active":
                    self._release(job)
                self._status.pop(name, None)
            elif before is None or before.state != "active":
                self._status[name] = self._take(job)
                if self._status[name] != before:
                    self._say(name)
        return self.status()

    def _take(self, job: Job) -> Status:
        try:
            job.check()
            status = Status("active", job.take())
        except UnavailableError as error:
            status = Status("unavailable", error.reason, error.remedy)
        except Exception as error:  # whatever happens here, the engine must start
            status = Status("unavailable", f"{type(error).__name__}: {error}")
        return status

    def _say(self, name: str) -> None:
        status = self._status[name]
        if status.state == "active":
            self.log.info("abiding: %s is active: %s", name, status.reason)
        else:
            self.log.warning("abiding: %s is left to %s: %s", name, self.name, status.reason)

    def _release(self, job: Job) -> None:
        try:
            job.release()
            self.log.info("abiding: %s is off", job.name)
        except Exception:
            self.log.exception("abiding: %s could not be undone; restart the process", job.name)

    def status(self, *, probe: bool = False, chosen: Iterable[str] = ()) -> dict[str, Status]:
        """The status of every job; with ``probe``, those that are not active are checked, which imports the engine."""
        chosen = set(chosen)
        if not probe:
            return {name: self._known(name, name in chosen) for name in self.jobs}
        if self.version() is None:
            return dict.fromkeys(self.jobs, Status("off", f"{self.name} is not installed", f"pip install {self.name}"))
        return {name: self._probe(job, name in chosen) for name, job in self.jobs.items()}

    def _known(self, name: str, chosen: bool) -> Status:
        reason = "chosen, but not registered in this process" if chosen else "not chosen"
        return self._status.get(name, Status("off", reason, self.how))

    def _probe(self, job: Job, chosen: bool) -> Status:
        known = self._known(job.name, chosen)
        if known.state == "active":
            return known
        try:
            job.check()
        except UnavailableError as error:
            return Status("unavailable", error.reason, error.remedy)
        except Exception as error:
            return Status("unavailable", f"{type(error).__name__}: {error}")
        return Status("ready", f"chosen; active once {self.name} starts") if chosen else known

    def version(self) -> str | None:
        """The installed release of the engine, or None; does not import it."""
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None
