"""Batch tasks: the runs of many jobs are collected, and one call of the function serves them all.

The function is written over lists, one for each parameter; whoever enqueues gives single values.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from sqlqueue.run import Run
from sqlqueue.store import Ended


class Batch:
    """Runs of one task that are served together; executors take it as they take a run."""

    is_over = True  # each of its runs says for itself how it ended

    def __init__(self, runs: Sequence[Run], done: Callable[[Run, Ended | None], None]) -> None:
        self.runs = list(runs)
        self.handle: Any = None
        self.function = runs[0].registered.function
        self.answers: Any = None
        self._done = done

    @contextmanager
    def serve(self) -> Iterator[dict[str, list[Any]]]:
        """Begin the runs and lend their arguments, a list for each parameter; end them.

        Whoever calls the function puts what it returns into `answers`. Nothing is lent if no run
        can begin.
        """
        columns = self._begin()
        try:
            with ExitStack() as stack:
                for run in self.runs:
                    stack.enter_context(run.around())
                yield columns
            if len(self.answers) != len(self.runs):
                raise ValueError(f"{len(self.answers)} answers for {len(self.runs)} jobs")
        except BaseException as error:
            self.answers = [error] * len(self.runs)
            if any(run.interrupted for run in self.runs):
                for run in self.runs:  # those that had more time run again
                    is_late = run.ran_for() >= (run.row.timeout or float("inf"))
                    run.interrupted = run.interrupted or ("timed_out" if is_late else "returned")
        for run, answer in zip(self.runs, self.answers, strict=True):
            self._end(run, answer)

    def _begin(self) -> dict[str, list[Any]]:
        calls: list[dict[str, Any]] = []
        for run in list(self.runs):
            try:
                calls.append(run.begin()[1])
                run.handle, run.started = self.handle, self.runs[0].started
            except BaseException as error:
                self.runs.remove(run)
                self._end(run, error)
        return {name: [call[name] for call in calls] for name in (calls or [{}])[0]}

    def _end(self, run: Run, answer: Any) -> None:
        run.handle = None
        try:
            is_error = isinstance(answer, BaseException)
            ended = run.failed(answer) if is_error else run.succeeded(answer)
        except Exception as error:
            ended = run.failed(error)
        self._done(run, ended)
