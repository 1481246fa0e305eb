"""OpenTelemetry: the trace of who enqueued a job goes on in its runs.

The context travels in the job's headers, as W3C Trace Context has it (`traceparent`).
"""

from contextlib import AbstractContextManager

from opentelemetry import propagate, trace

from sqlqueue.queue import Queue
from sqlqueue.run import Run
from sqlqueue.task import Call


def instrument(queue: Queue) -> None:
    """Have the jobs of a queue carry the context of their caller, and each run be a span.

    A span is named as the task, of the kind consumer, with the ids of job and run; it records what
    the task raises. Call it once, where the queue is made, so that workers do too.
    """
    tracer = trace.get_tracer("sqlqueue")

    def inject(call: Call) -> Call:
        carried: dict[str, str] = {}
        propagate.inject(carried)
        if not carried:
            return call
        headers = {**call.options.headers, **carried}
        return call._replace(options=call.options.changed({"headers": headers}))

    def span(run: Run) -> AbstractContextManager[object]:
        attributes: dict[str, str | int] = {
            "messaging.system": "sqlqueue",
            "messaging.destination.name": run.queue,
            "messaging.message.id": run.key[0],
            "sqlqueue.run": run.number,
            "sqlqueue.attempt": run.attempt,
        }
        context, kind = propagate.extract(run.headers), trace.SpanKind.CONSUMER
        return tracer.start_as_current_span(run.task, context, kind, attributes)

    queue.before_enqueue.append(inject)
    queue.around_run.append(span)
