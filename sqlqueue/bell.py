"""When an idle worker sleeps, for how long, and how enqueuing wakes it.

A notification takes a lock on the whole database until its transaction has committed, so only
those that somebody waits for are sent: a worker that has found nothing hangs a bell at its
queues, looks once more and sleeps; enqueuing notifies if it finds a bell. Polling is the
guarantee, the bell only the speed.
"""

from datetime import timedelta
from time import monotonic

from sqlqueue.store import Executes, Lane, Store

LINGER = (0.002, 0.005, 0.01)  # seconds between looks, before the bell is hung
DOZE = 0.05  # seconds of the first sleep; each is twice as long as the last, up to the poll


class Bell:
    """The bells of one worker, and its looks since it last found a job.

    poll       longest sleep
    has_hung   whether one was hung since `has_hung` was last set to False
    is_in_vain whether one hangs although the worker is awake: to be taken down soon
    """

    def __init__(self, store: Store, queues: list[str], poll: timedelta) -> None:
        self._store = store
        self._queues = queues
        self._poll = poll.total_seconds()
        self._patience = 2 * poll + timedelta(seconds=1)
        self._hangs_until = 0.0
        self._looks = 0
        self.has_hung = False
        self.is_in_vain = False

    def look(self) -> None:
        """Look again soon: somebody rang."""
        self._looks = 0

    def found(self, conn: Executes, filled_by: Lane | None, knows_next: bool = False) -> None:
        """Take note of jobs; if this lane filled all slots, wake the others for the rest.

        Whoever knows when the next may start need not look before.
        """
        self._looks = len(LINGER) if knows_next else 0
        if self._hangs_until > monotonic():
            self.is_in_vain = True
            if filled_by:
                self._store.pass_on(conn, filled_by.queue, filled_by.priority)
        self._hangs_until = 0.0

    def take_down(self, conn: Executes, worker: int) -> None:
        """Take the bell away if it is in vain: in a turn of its own, jobs start first."""
        if self.is_in_vain:
            self._store.disarm(conn, self._queues, worker)
            self.is_in_vain = False

    def found_nothing(self, conn: Executes, worker: int, is_heard: bool) -> None:
        """Hang the bell after a few looks, if the worker would hear it, or when it grows old."""
        self._looks += 1
        now, lasts = monotonic(), self._patience.total_seconds()
        if is_heard and self._looks >= len(LINGER) and self._hangs_until - now < lasts / 2:
            self._store.arm(conn, self._queues, worker, self._patience)
            if self._hangs_until <= now:
                self._looks = len(LINGER) - 1  # look once more before the sleep
                self.has_hung = True
            self._hangs_until = now + lasts

    def pause(self) -> float:
        """Return the seconds to sleep before the next look."""
        if self._looks < len(LINGER):
            return LINGER[self._looks]
        return min(DOZE * 2.0 ** min(self._looks - len(LINGER), 20), self._poll)
