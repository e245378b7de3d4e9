"""Commands about evaluations: submit, batch, status, list, cancel."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from crucible.cli import explain, requests
from crucible.cli.client import ApiError, UnreachableError, evaluation_path
from crucible.cli.exit_codes import ExitCode, for_status
from crucible.cli.following import BOTH, follow_output, output_document
from crucible.cli.session import Session, command, header_value, unreachable
from crucible.cli.text import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import RenderableType

    from crucible.cli.client import Client, Document

Priority = Annotated[int | None, typer.Option("--priority", "-p", help="0 (last) to 10 (first).")]
Timeout = Annotated[int | None, typer.Option("--timeout", "-t", help="Time limit, seconds.")]
Profile = Annotated[str | None, typer.Option(help="Named CPU and memory limits, such as small, medium or large.")]
Memory = Annotated[str | None, typer.Option(help="Memory limit, a Kubernetes quantity such as 512Mi.")]
Cpu = Annotated[str | None, typer.Option(help="CPU limit, a Kubernetes quantity such as 500m.")]
Labels = Annotated[list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="Label; may be repeated.")]
Wait = Annotated[bool, typer.Option("--wait", "-w", help="Wait for the end; the exit code is 1 unless completed.")]
EvaluationId = Annotated[str, typer.Argument(metavar="ID", help="An evaluation's id.")]
_LIST_PAGE = 100


@command
def submit(
    session: Session,
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="Python source file; - is standard input.")
    ] = None,
    *,
    code: Annotated[str | None, typer.Option(help="Python source text, in place of a file.")] = None,
    stdin: Annotated[str | None, typer.Option(help="Text that the code finds on its standard input.")] = None,
    stdin_file: Annotated[str | None, typer.Option(help="File with the code's standard input; - is our own.")] = None,
    priority: Priority = None,
    timeout: Timeout = None,
    queue_timeout: Annotated[int | None, typer.Option(help="Longest time to wait in the queue, seconds.")] = None,
    profile: Profile = None,
    memory: Memory = None,
    cpu: Cpu = None,
    label: Labels = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key again gives the same evaluation.")] = None,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="How many copies to submit.")] = 1,
    wait: Wait = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the output as it comes, and wait.")] = False,
) -> None:
    """Submit Python code; prints the evaluation's id."""
    if (file is None) == (code is None):
        raise typer.BadParameter("give either a FILE or --code", param_hint="FILE")
    if stdin is not None and stdin_file is not None:
        raise typer.BadParameter("give either --stdin or --stdin-file", param_hint="--stdin-file")
    if count > 1 and (follow or idempotency_key):
        raise typer.BadParameter("--follow and --idempotency-key are for a single evaluation", param_hint="--count")
    body = requests.given(
        code=code if code is not None else requests.read_text(file or "-", "FILE"),
        stdin=requests.read_text(stdin_file, "--stdin-file") if stdin_file is not None else stdin,
        priority=priority,
        timeout_seconds=timeout,
        queue_timeout_seconds=queue_timeout,
        profile=profile,
        memory_limit=memory,
        cpu_limit=cpu,
        labels=requests.parse_labels(label or ()),
    )
    if count > 1:
        _submit_many(session, [requests.Item(f"copy {n + 1}", body) for n in range(count)], wait=wait)
        return
    client = session.client()
    headers = {"Idempotency-Key": header_value(idempotency_key, "--idempotency-key")} if idempotency_key else {}
    evaluation: Document = client.call("POST", "/v1/evaluations", body=body, headers=headers)
    if follow:
        _follow(session, client, evaluation["id"])
    elif wait:
        with interruptible(session, [evaluation["id"]]):
            evaluation = client.wait_ended(evaluation["id"])
        session.emit(evaluation, lambda: explain.explain(evaluation))
        raise typer.Exit(exit_code([evaluation]))
    else:
        session.emit(evaluation, lambda: plain(evaluation["id"]))


def _follow(session: Session, client: Client, evaluation_id: str) -> None:
    """Show the output as it comes, then how it ended. A machine gets both in one document instead."""
    session.note(evaluation_id)
    with interruptible(session, [evaluation_id]):
        if session.as_json:
            evaluation = client.wait_ended(evaluation_id)
            session.emit_json({**evaluation, "output": output_document(client, evaluation_id)})
        else:
            follow_output(client, evaluation_id, BOTH)
            evaluation = client.wait_ended(evaluation_id)
            session.err.print(explain.explain(evaluation))
    raise typer.Exit(exit_code([evaluation]))


def _submit_many(session: Session, wanted: list[requests.Item], *, wait: bool) -> None:
    """Submit in as few calls as the API allows, perhaps wait for all ends, and show one line for each."""
    client = session.client()
    results: list[Document] = []
    for portion in progressing(session, "submitting", list(requests.portions(wanted)), weight=len):
        items = _submit_portion(client, portion, first=not results)
        results += [{"source": item.source, **result} for item, result in zip(portion, items, strict=True)]
    for index, result in enumerate(results):
        result["index"] = index
    accepted = [result for result in results if result.get("evaluation")]
    if wait:
        # In the order in which the queue takes them, so that the bar moves when something ends.
        accepted.sort(key=lambda result: -result["evaluation"]["priority"])
        with interruptible(session, [result["evaluation"]["id"] for result in accepted]):
            for result in progressing(session, "running", accepted):
                result["evaluation"] = client.wait_ended(result["evaluation"]["id"])
    rejected = [result for result in results if not result.get("evaluation")]
    session.emit(
        {"items": results, "accepted": len(accepted), "rejected": len(rejected)},
        lambda: _batch_view(results, ended=wait),
    )
    if rejected:
        raise typer.Exit(max(for_status(result["problem"].get("status", 503)) for result in rejected))
    if wait:
        raise typer.Exit(exit_code(result["evaluation"] for result in accepted))


def _submit_portion(client: Client, portion: list[requests.Item], *, first: bool) -> list[Document]:
    """Submit at most a hundred; returns one result each, whatever happened, so that what was accepted before is still told."""
    body = {"evaluations": [item.body for item in portion]}
    try:
        items: list[Document] = client.call("POST", "/v1/evaluations/batch", body=body)["items"]
    except (ApiError, UnreachableError) as error:
        problem = error.problem if isinstance(error, ApiError) else unreachable(error)
        # Where every item was refused the answer is a problem, which lists them all the same.
        if "items" in problem:
            return list(problem["items"])
        if first:
            raise
        return [{"status": "rejected", "problem": problem} for _ in portion]
    return items


def _batch_view(results: list[Document], *, ended: bool) -> RenderableType:
    evaluations = [result["evaluation"] for result in results if result.get("evaluation")]
    shown: list[RenderableType] = [explain.listing(evaluations)] if ended else [plain(e["id"]) for e in evaluations]
    for result in results:
        if problem := result.get("problem"):
            shown.append(plain(f"{result['source']}: {problem['title']}: {problem.get('detail', '')}", "red"))
            shown += [plain(f"  {v['field']}: {v['message']}") for v in problem.get("violations") or ()]
    return Group(*shown)


@command
def batch(
    session: Session,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="JSON or JSON lines of requests (- is standard input), or a folder of .py files."
        ),
    ],
    *,
    priority: Priority = None,
    timeout: Timeout = None,
    profile: Profile = None,
    memory: Memory = None,
    cpu: Cpu = None,
    label: Labels = None,
    wait: Wait = False,
) -> None:
    """Submit many evaluations at once. Options apply to the requests that do not set the field themselves."""
    defaults = requests.given(
        priority=priority,
        timeout_seconds=timeout,
        profile=profile,
        memory_limit=memory,
        cpu_limit=cpu,
        labels=requests.parse_labels(label or ()),
    )
    _submit_many(session, requests.read_batch(path, defaults), wait=wait)


@command
def status(
    session: Session,
    evaluation_id: EvaluationId,
    *,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Wait for the end first; the exit code is 1 unless completed.")
    ] = False,
) -> None:
    """Explain an evaluation: where it is, why it waits and for how long, how and why it ended."""
    client = session.client()
    if wait:
        with interruptible(session, [evaluation_id]):
            evaluation = client.wait_ended(evaluation_id)
    else:
        evaluation = client.evaluation(evaluation_id)
    session.emit(evaluation, lambda: explain.explain(evaluation))
    if wait:
        raise typer.Exit(exit_code([evaluation]))


@command
def list_evaluations(
    session: Session,
    *,
    state: Annotated[
        list[str] | None, typer.Option("--state", "-s", help="Only in this state; may be repeated.")
    ] = None,
    reason: Annotated[list[str] | None, typer.Option(help="Only ended for this reason; may be repeated.")] = None,
    priority: Annotated[int | None, typer.Option("--priority", "-p", help="Only of this priority.")] = None,
    label: Labels = None,
    since: Annotated[str | None, typer.Option(help="Submitted since: ISO 8601, or an age such as 2h or 7d.")] = None,
    until: Annotated[str | None, typer.Option(help="Submitted before: ISO 8601, or an age.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only of this owner (operators).")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most evaluations to list.")] = 50,
) -> None:
    """List evaluations, newest first."""
    client = session.client()
    requests.parse_labels(label or ())
    page: Document = client.get(
        "/v1/evaluations",
        state=state,
        reason=reason,
        priority=priority,
        label=label,
        since=requests.parse_time(since, "--since"),
        until=requests.parse_time(until, "--until"),
        owner=owner,
        limit=min(limit, _LIST_PAGE),
    )
    items = page["items"]
    while page.get("next") and len(items) < limit:
        page = client.get(page["next"])
        items += page["items"]
    more = bool(page.get("next")) or len(items) > limit
    session.emit({"items": items[:limit], "more": more}, lambda: explain.listing(items[:limit]))
    if more:
        session.note(f"there are more; --limit {2 * limit} shows twice as many")


@command
def cancel(
    session: Session,
    evaluation_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Evaluations to cancel.")],
) -> None:
    """Cancel evaluations that wait or run. One that has ended already stays as it ended."""
    client = session.client()
    results: list[Document] = []
    worst = ExitCode.OK
    for evaluation_id in evaluation_ids:
        try:
            evaluation = client.call("POST", evaluation_path(evaluation_id, "/cancel"))
        except ApiError as error:
            worst = max(worst, for_status(error.status))
            results.append({"id": evaluation_id, "problem": error.problem})
        else:
            results.append({"id": evaluation_id, "evaluation": evaluation})
    session.emit({"items": results}, lambda: Group(*map(_cancel_line, results)))
    raise typer.Exit(worst)


def _cancel_line(result: Document) -> RenderableType:
    if problem := result.get("problem"):
        return plain(f"{result['id']}  ") + plain(f"{problem['title']}: {problem.get('detail', '')}", "red")
    return plain(f"{result['id']}  ") + explain.state(result["evaluation"])


def exit_code(evaluations: Iterable[Document]) -> ExitCode:
    """Return OK only if every evaluation completed."""
    completed = all(evaluation["state"] == "completed" for evaluation in evaluations)
    return ExitCode.OK if completed else ExitCode.NOT_COMPLETED


@contextmanager
def interruptible(session: Session, evaluation_ids: list[str]) -> Iterator[None]:
    """Say on Ctrl-C that the evaluations go on, and how to find them."""
    try:
        yield
    except KeyboardInterrupt:
        some = " ".join(evaluation_ids[:3]) + (" ..." if len(evaluation_ids) > 3 else "")
        session.note(f"interrupted; on the platform it goes on. Stop it with: crucible cancel {some}")
        raise


T = TypeVar("T")


def progressing(session: Session, what: str, items: list[T], weight: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """Give the items one after the other, with a progress bar for whoever watches."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=session.err, disable=not session.live, transient=True) as progress:
        task = progress.add_task(what, total=sum(map(weight, items)))
        for item in items:
            yield item
            progress.advance(task, weight(item))
