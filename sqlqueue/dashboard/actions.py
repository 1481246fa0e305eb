"""What a visitor changes: each action has a role, is one call of an Operator, and leaves a row.

Every change is a POST of a form of ours. Many jobs, and what cannot be undone, are asked about
first, on a page that freezes which jobs they are.
"""

import base64
import binascii
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple
from uuid import UUID

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from sqlqueue.dashboard.app import Site, access_of, form_of, site_of
from sqlqueue.policy import Policy, Rate
from sqlqueue.reports.hiding import restored
from sqlqueue.reports.search import _duration, parse
from sqlqueue.reports.verbs import MOST, STATES, Operator

Form = dict[str, str]
SURE = ("delete",)  # the number of jobs is to be typed


class Action(NamedTuple):
    """What it takes to do it, and what does it; a verb of jobs has no function."""

    role: str
    do: Callable[[Site, Operator, Form], Any] | None = None


def _pause(site: Site, operator: Operator, form: Form) -> None:
    lasts = _duration(form["lasts"]) if form.get("lasts") else None
    operator.call(
        "pause", scope=form["scope"], name=form["name"], is_paused=True, by=operator.actor,
        why=form.get("why") or None, lasts=lasts,
    )  # fmt: skip


def _resume(site: Site, operator: Operator, form: Form) -> None:
    operator.call("pause", scope=form["scope"], name=form["name"], is_paused=False)


def _limit(site: Site, operator: Operator, form: Form) -> None:
    running, rate = form.get("concurrency", ""), form.get("rate", "")
    jobs, _, per = rate.partition("/")
    policy = Policy(
        concurrency=int(running) if running else None,
        rate=Rate(float(jobs), _duration(per)) if rate else None,
    )
    rules = policy.to_json() if running or rate else None
    operator.call("set_policy", scope="queue", name=form["name"], rules=rules)


def _enqueue(site: Site, operator: Operator, form: Form) -> str:
    args = json.loads(form.get("args") or "{}")
    if not isinstance(args, dict):
        raise ValueError("the arguments must be a JSON object")
    queue = form.get("queue") or "default"
    made = operator.call("enqueue", task=form["name"], args=json.dumps(args), queue=queue)
    operator.call("note", verb="enqueue", target=f"{form['name']} {made}", affected=1, skipped=0)
    return f"/jobs/{made}"


def _edit(site: Site, operator: Operator, form: Form) -> str:
    with site.reading() as reports:
        found = reports.job(UUID(form["job"]))
    if found is None:
        raise HTTPException(404, "There is no such job.")
    edited = json.loads(form.get("args") or "null")
    return f"/jobs/{operator.edit(found, restored(edited, found['args']))}"


def _mute(site: Site, operator: Operator, form: Form) -> None:
    lasts = _duration(form.get("lasts") or "1d")
    operator.call("mute_failures", fingerprint=form["name"], lasts=lasts)


def _tell(what: str) -> Callable[[Site, Operator, Form], None]:
    def tell(site: Site, operator: Operator, form: Form) -> None:
        if not operator.call("tell_worker", worker=int(form["name"]), what=what):
            raise HTTPException(409, "That worker has ended.")

    return tell


def _run(site: Site, operator: Operator, form: Form) -> None:
    operator.call("run_schedule", name=form["name"])


def _remove(site: Site, operator: Operator, form: Form) -> None:
    operator.call("remove_schedule", name=form["name"])


ACTIONS = {
    **{verb: Action("admin" if verb == "delete" else "operate") for verb in STATES},
    "pause": Action("operate", _pause),
    "resume": Action("operate", _resume),
    "mute": Action("operate", _mute),
    "drain": Action("operate", _tell("drain")),
    "stop": Action("operate", _tell("stop")),
    "run_schedule": Action("operate", _run),
    "limit": Action("admin", _limit),
    "enqueue": Action("admin", _enqueue),
    "edit": Action("admin", _edit),
    "remove_schedule": Action("admin", _remove),
}


async def act(request: Request) -> Response:
    """Do an action, if the visitor may and the form is ours; then show the page it came from."""
    site, access, fields = site_of(request), access_of(request), await form_of(request)
    action = ACTIONS.get(request.path_params["name"])
    form = {name: values[-1] for name, values in fields.items()}
    if action is None:
        raise HTTPException(404, "There is no such action.")
    if not site.forms.is_ours(request, access, form.get("token", "")):
        raise HTTPException(403, "The form is not ours, or too old: load the page again.")
    if not await run_in_threadpool(lambda: site.is_writable):
        raise HTTPException(403, "Nothing can be changed here.")
    if not access.may(action.role):
        raise HTTPException(403, f"That takes the role {action.role}.")
    try:
        return await run_in_threadpool(_do, request, site, action, form, fields.get("job", []))
    except (ValueError, KeyError, TypeError) as error:
        says = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise HTTPException(400, says) from error


def _do(request: Request, site: Site, action: Action, form: Form, ids: list[str]) -> Response:
    operator = site.operator(request)
    if action.do is None:
        return _change(request, site, operator, form, ids)
    return _back(request, form, action.do(site, operator, form))


def _back(request: Request, form: Form, place: str | None = None) -> Response:
    """Go to a page, or to the one that the form was on, which then says what was done."""
    root = request.scope.get("root_path", "").rstrip("/")
    back = place or form.get("back", "/")
    if not back.startswith("/") or back.startswith("//") or "\\" in back:
        back = "/"
    sign = "&" if "?" in back else "?"
    return RedirectResponse(f"{root}{back}{sign}done=1", 303)


# Verbs of jobs


def _change(
    request: Request, site: Site, operator: Operator, form: Form, words: list[str]
) -> Response:
    """Do a verb to the jobs that were chosen; ask first, if there are many or it cannot be undone.

    all=1 stands for all that the search in `q` finds; `frozen` for those of the page that asked.
    """
    verb = request.path_params["name"]
    how = _how(verb, form)
    if "frozen" in form:
        ids = _thawed(form["frozen"])
        if verb in SURE and form.get("typed", "").replace(",", "") != str(len(ids)):
            raise HTTPException(400, f"Type the number of jobs, {len(ids)}, to {verb} them.")
        operator.change(verb, ids, form.get("q", ""), how)
        return _back(request, form)
    if form.get("all"):
        search = parse(form.get("q", ""))
        search.states &= set(STATES[verb])
        with site.reading() as reports:
            ids = search.find(reports, MOST).ids if search.states else []
    else:
        ids = list(dict.fromkeys(UUID(word) for word in words))
        if len(ids) == 1 and verb not in SURE:
            operator.change(verb, ids, how=how)
            return _back(request, form)
    if not ids:
        raise HTTPException(400, "No job was chosen, or none is in a state for that.")
    return _ask(request, site, verb, ids, form)


def _how(verb: str, form: Form) -> dict[str, Any]:
    how: dict[str, Any] = {}
    if verb == "move":
        if form.get("to_queue"):
            how["queue"] = form["to_queue"]
        if form.get("to_priority"):
            how["priority"] = int(form["to_priority"])
        if not how:
            raise ValueError("Say where to: a queue or a priority.")
    if verb == "retry" and form.get("spread"):
        how["spread"] = _duration(form["spread"])
    return how


def _ask(request: Request, site: Site, verb: str, ids: list[UUID], form: Form) -> Response:
    """Show what would be done, and to which jobs."""
    with site.reading() as reports:
        first = reports.jobs(ids[:10])
        (ends,) = reports.rows(
            "select min(created_at) as oldest, max(created_at) as newest,"
            " array_agg(distinct queue) as queues from sqlqueue.jobs where id = any (:ids)",
            ids=ids,
        )
    kept = {name: form.get(name, "") for name in ("q", "back", "to_queue", "to_priority")}
    return site.page(
        request, "confirm.html", verb=verb, number=len(ids), most=MOST, first=first, ends=ends,
        kept=kept, frozen=_frozen(ids), must_type=verb in SURE, lasts=timedelta(minutes=10),
    )  # fmt: skip


def _frozen(ids: list[UUID]) -> str:
    return base64.b64encode(b"".join(one.bytes for one in ids)).decode()


def _thawed(text: str) -> list[UUID]:
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("the jobs of the form cannot be read") from error
    if len(data) % 16 or len(data) > 16 * MOST:
        raise ValueError("the jobs of the form cannot be read")
    return [UUID(bytes=data[place : place + 16]) for place in range(0, len(data), 16)]
