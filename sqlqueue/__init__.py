"""A durable task queue in the application's own Postgres."""

__version__ = "0.2.0.dev0"

from sqlqueue.errors import BadArguments as BadArguments
from sqlqueue.errors import Cancel as Cancel
from sqlqueue.errors import DuplicateJob as DuplicateJob
from sqlqueue.errors import IdOutOfRange as IdOutOfRange
from sqlqueue.errors import JobFailed as JobFailed
from sqlqueue.errors import JobNotFound as JobNotFound
from sqlqueue.errors import LeaseLost as LeaseLost
from sqlqueue.errors import NotEnded as NotEnded
from sqlqueue.errors import NotRepresentable as NotRepresentable
from sqlqueue.errors import QueueFull as QueueFull
from sqlqueue.errors import RetryIn as RetryIn
from sqlqueue.errors import SchemaMismatch as SchemaMismatch
from sqlqueue.errors import Snooze as Snooze
from sqlqueue.errors import SqlqueueError as SqlqueueError
from sqlqueue.errors import UniqueKeyBusy as UniqueKeyBusy
from sqlqueue.errors import UnsupportedTransaction as UnsupportedTransaction
from sqlqueue.job import Job as Job
from sqlqueue.options import Options as Options
from sqlqueue.policy import Policy as Policy
from sqlqueue.policy import Rate as Rate
from sqlqueue.policy import Unique as Unique
from sqlqueue.queue import Queue as Queue
from sqlqueue.retry import Retry as Retry
from sqlqueue.run import Run as Run
from sqlqueue.run import current_run as current_run
from sqlqueue.schedule import Schedule as Schedule
from sqlqueue.store import Ended as Ended
from sqlqueue.task import Call as Call
from sqlqueue.task import Task as Task
from sqlqueue.worker import Worker as Worker
from sqlqueue.worker import WorkerOptions as WorkerOptions
