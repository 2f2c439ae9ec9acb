"""ThreadTuner: how many threads the device's small steps get, as the machine gets busy or free. Pure; seconds are handed in.

Threads of one operator wait for each other. On free cores two are faster than one; when others want the cores, too, two can be ten
times slower than one, as each of a step's hundreds of operators waits for a thread that has no core.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

_SAMPLES_BEFORE_TRIAL = 8
_TRIAL_STEPS = 3
_FIRST_INTERVAL = 64
_LONGEST_INTERVAL = 2048
_MUCH_SLOWER = 2.0
_WORTH_IT = 0.9
_DRIFT = 1.5


@dataclass(slots=True)
class _Pace:
    """Seconds of steps of one size with the present count."""

    smoothed_s: float
    num_samples: int = 1
    at_choice_s: float | None = None
    """When the last trial was made; None before the first."""

    def note(self, seconds: float) -> None:
        self.smoothed_s += 0.2 * (min(seconds, 4 * self.smoothed_s) - self.smoothed_s)
        self.num_samples += 1

    @property
    def has_drifted(self) -> bool:
        if self.at_choice_s is None:
            return False
        return not 1 / _DRIFT < self.smoothed_s / self.at_choice_s < _DRIFT


@dataclass(slots=True)
class _Trial:
    threads: int
    size: int
    times_s: list[float] = field(default_factory=list)


class ThreadTuner:
    """Tries another count for up to three steps now and then: after 64 steps, or sooner if steps have become much slower or faster.

    A trial that is twice as slow ends after one step, and each one in vain doubles the steps until the next, up to 2,048. So trials
    cost less than a few percent even where they are ten times slower.
    """

    def __init__(self, candidates: Sequence[int], chosen: int) -> None:
        """candidates: thread counts to choose from; one of them: it is never changed."""
        self.threads = chosen
        self._others = sorted(set(candidates) - {chosen})
        self._paces: dict[int, _Pace] = {}
        self._interval = _FIRST_INTERVAL
        self._until_trial = _FIRST_INTERVAL
        self._trial: _Trial | None = None

    def threads_for(self, size: int) -> int:
        """Of the next step, which has so many tokens."""
        if self._trial is None and self._others and self._is_time(size):
            self._trial = _Trial(self._others[0], size)
        return self._trial.threads if self._trial is not None and self._trial.size == size else self.threads

    def note(self, size: int, threads: int, seconds: float) -> None:
        """A step of so many tokens took so long with so many threads."""
        trial = self._trial
        if trial is not None and (size, threads) == (trial.size, trial.threads):
            trial.times_s.append(seconds)
            self._judge(trial)
            return
        self._until_trial -= 1
        if threads != self.threads:
            return
        if size in self._paces:
            self._paces[size].note(seconds)
        else:
            self._paces[size] = _Pace(seconds)

    def _is_time(self, size: int) -> bool:
        pace = self._paces.get(size)
        if pace is None or pace.num_samples < _SAMPLES_BEFORE_TRIAL:
            return False
        if self._until_trial <= 0:
            return True
        return pace.has_drifted and self._until_trial <= self._interval - _FIRST_INTERVAL // 4

    def _judge(self, trial: _Trial) -> None:
        pace = self._paces[trial.size]
        ratio = statistics.median(trial.times_s) / pace.smoothed_s
        if len(trial.times_s) < _TRIAL_STEPS and ratio < _MUCH_SLOWER:
            return
        self._trial = None
        pace.at_choice_s = pace.smoothed_s
        if ratio < _WORTH_IT:
            self._others = [*self._others[1:], self.threads]
            self.threads = trial.threads
            self._paces = {trial.size: _Pace(statistics.median(trial.times_s))}
            self._interval = _FIRST_INTERVAL
        else:
            self._others = [*self._others[1:], self._others[0]]
            self._interval = min(2 * self._interval, _LONGEST_INTERVAL)
        self._until_trial = self._interval
