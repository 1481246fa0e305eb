"""What a visitor changes: each action has a role, is one call of an Operator, and leaves a row.

Every change is a POST of a form of ours. Many jobs, and what cannot be undone, are asked about
first, on a page that freezes which jobs they are.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import parse_qs
from uuid import UUID

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from sqlqueue.dashboard.app import Visit
from sqlqueue.policy import Policy, Rate
from sqlqueue.reports import Reports, Row
from sqlqueue.reports.hiding import restored
from sqlqueue.reports.search import Search, duration
from sqlqueue.reports.verbs import MOST, STATES

Form = dict[str, str]
LARGE = 4_000_000  # bytes of a form
SURE = ("delete",)  # the number of jobs is to be typed
# What a verb of jobs is told of its form: the field, and how it is read.
HOW: dict[str, dict[str, tuple[str, Callable[[str], Any]]]] = {
    "move": {"queue": ("to_queue", str), "priority": ("to_priority", int)},
    "retry": {"spread": ("spread", duration)},
}


class Action(NamedTuple):
    """What it takes to do it, and what does it.

    do  is given the name of the action; returns an answer, the page to go to, or None: back
    """

    role: str
    do: Callable[[Visit, str, Form], Response | str | None]


def _pause(visit: Visit, name: str, form: Form) -> None:
    operator = visit.operator()
    lasts = duration(form["lasts"]) if form.get("lasts") else None
    operator.call(
        "pause", scope=form["scope"], name=form["name"], is_paused=name == "pause",
        by=operator.actor, why=form.get("why") or None, lasts=lasts,
    )  # fmt: skip


def _limit(visit: Visit, name: str, form: Form) -> None:
    running, rate = form.get("concurrency", ""), form.get("rate", "")
    jobs, _, per = rate.partition("/")
    policy = Policy(
        concurrency=int(running) if running else None,
        rate=Rate(float(jobs), duration(per)) if rate else None,
    )
    rules = policy.to_json() if running or rate else None
    visit.operator().call("set_policy", scope="queue", name=form["name"], rules=rules)


def _enqueue(visit: Visit, name: str, form: Form) -> str:
    args, task, operator = json.loads(form.get("args") or "{}"), form["name"], visit.operator()
    if not isinstance(args, dict):
        raise ValueError("the arguments must be a JSON object")
    queue = form.get("queue") or "default"
    made = operator.call("enqueue", task=task, args=json.dumps(args), queue=queue)
    operator.call("note", verb="enqueue", target=f"{task} {made}", affected=1, skipped=0)
    return f"/jobs/{made}"


def _edit(visit: Visit, name: str, form: Form) -> str:
    with visit.site.reading() as reports:
        found = reports.job(UUID(form["job"]))
    if found is None:
        raise HTTPException(404, "There is no such job.")
    edited = json.loads(form.get("args") or "null")
    return f"/jobs/{visit.operator().edit(found, restored(edited, found['args']))}"


def _mute(visit: Visit, name: str, form: Form) -> None:
    lasts = duration(form.get("lasts") or "1d")
    visit.operator().call("mute_failures", fingerprint=form["name"], lasts=lasts)


def _tell(visit: Visit, name: str, form: Form) -> None:
    if not visit.operator().call("tell_worker", worker=int(form["name"]), what=name):
        raise HTTPException(409, "That worker has ended.")


def _schedule(visit: Visit, name: str, form: Form) -> None:
    visit.operator().call(name, name=form["name"])


def _change(visit: Visit, verb: str, form: Form) -> Response | None:
    """Do a verb to the jobs that were chosen; ask first, if there are many or it cannot be undone.

    all=1 stands for all that the search in `q` finds; `frozen` for those of the page that asked.
    """
    fields = HOW.get(verb, {}).items()
    how = {name: read(form[field]) for name, (field, read) in fields if form.get(field)}
    if verb == "move" and not how:
        raise ValueError("Say where to: a queue or a priority.")
    ids = _chosen(visit, verb, form)
    if "frozen" not in form and (len(ids) > 1 or verb in SURE or form.get("all")):
        return _ask(visit, verb, form, ids)
    if (
        "frozen" in form
        and verb in SURE
        and form.get("typed", "").replace(",", "") != f"{len(ids)}"
    ):
        raise HTTPException(400, f"Type the number of jobs, {len(ids)}, to {verb} them.")
    visit.operator().change(verb, ids, form.get("q", "") if "frozen" in form else "", how)
    return None


def _chosen(visit: Visit, verb: str, form: Form) -> list[UUID]:
    if form.get("all") and "frozen" not in form:
        search = Search(form.get("q", ""))
        search.states &= set(STATES[verb])
        with visit.site.reading() as reports:
            ids = search.find(reports, MOST).ids if search.states else []
    else:
        ids = [UUID(word) for word in form.get("frozen", form.get("job", "")).split()]
    if not 0 < len(ids) <= MOST:
        raise HTTPException(400, f"Choose 1 to {MOST} jobs that are in a state for that.")
    return list(dict.fromkeys(ids))


def _ask(visit: Visit, verb: str, form: Form, ids: list[UUID]) -> Response:
    """Show what would be done, and to which jobs."""

    def read(_: Visit, reports: Reports) -> Row:
        (ends,) = reports.rows(
            "select min(created_at) as oldest, max(created_at) as newest,"
            " array_agg(distinct queue) as queues from sqlqueue.jobs where id = any (:ids)",
            ids=ids,
        )
        kept = {name: form.get(name, "") for name in ("q", "back", "to_queue", "to_priority")}
        kept["frozen"] = " ".join(one.hex for one in ids)
        return {
            "verb": verb, "number": len(ids), "most": MOST, "first": reports.jobs(ids[:10]),
            "ends": ends, "kept": kept, "must_type": verb in SURE,
        }  # fmt: skip

    return visit.page("confirm.html", read)


ACTIONS = {
    **dict.fromkeys(STATES, Action("operate", _change)),
    "delete": Action("admin", _change),
    "pause": Action("operate", _pause),
    "resume": Action("operate", _pause),
    "mute": Action("operate", _mute),
    "drain": Action("operate", _tell),
    "stop": Action("operate", _tell),
    "run_schedule": Action("operate", _schedule),
    "limit": Action("admin", _limit),
    "enqueue": Action("admin", _enqueue),
    "edit": Action("admin", _edit),
    "remove_schedule": Action("admin", _schedule),
}


async def act(request: Request) -> Response:
    """Do an action, if the visitor may and the form is ours; then show the page it came from."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGE:
            raise HTTPException(413, "The form is too large.")
    try:
        fields = parse_qs(body.decode("utf-8", "replace"), max_num_fields=20_000)
        form = {name: values[-1] for name, values in fields.items()}
        form["job"] = " ".join(fields.get("job", []))
        return await run_in_threadpool(_act, Visit(request), form)
    except (ValueError, KeyError, TypeError) as error:
        says = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise HTTPException(400, says) from error


def _act(visit: Visit, form: Form) -> Response:
    name = visit.request.path_params["name"]
    if name not in ACTIONS:
        raise HTTPException(404, "There is no such action.")
    if not visit.site.forms.is_ours(visit.request, visit.access, form.get("token", "")):
        raise HTTPException(403, "The form is not ours, or too old: load the page again.")
    action = ACTIONS[name]
    if not visit.site.is_writable:
        raise HTTPException(403, "Nothing can be changed here.")
    if not visit.access.may(action.role):
        raise HTTPException(403, f"That takes the role {action.role}.")
    done = action.do(visit, name, form)
    return (
        done if isinstance(done, Response) else visit.back(done or form.get("back", "/"), "done=1")
    )
