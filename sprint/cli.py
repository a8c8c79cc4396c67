"""The command line: `sprint run | watch | status | doctor | keys | demo | bench`; exit codes stand in cli_reporting."""

from __future__ import annotations

import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sprint import __version__, cli_keys, config, logs, settings
from sprint.addresses import Address, parse_address
from sprint.cli_reporting import UsageError, prepare_streams, print_json, reporting
from sprint.inquiry import NoAnswerError, ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

app = typer.Typer(
    name="sprint",
    help="Hears of a new Bitcoin block first, proves it, and relays it to every subscriber.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(cli_keys.app, name="keys")

API_PORT = 8080
STREAM_PORT = 8434
"""Where an argument leaves the port out."""
QUESTIONS = {"health": "health", "turbo-status": "turbo-status", "sources": "sources", "blocks": "blocks?limit=8"}
"""What `sprint status` asks the API."""


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """A line on standard error meanwhile, if somebody looks at it."""
    if sys.stderr.isatty():
        with Console(stderr=True).status(what):
            yield
    else:
        yield


def _address(argument: str, otherwise: Callable[[], Address], port: int) -> Address:
    """What the argument names, or else the configuration. Raises UsageError, or ConfigError."""
    if not argument:
        return otherwise()
    try:
        return parse_address(argument, port)
    except ValueError as error:
        raise UsageError(f"ADDRESS {argument[:80]!r}: {error}") from None


def _run_help() -> str:
    lines = ["Run Sprint until SIGINT or SIGTERM.", ""]
    lines += ["Configured by the environment, then by .env in the working directory:", "", "\b"]
    for variable in settings.variables():
        text = f"{variable.description} Default: {variable.default}."
        lines += [variable.name, *textwrap.wrap(text, 74, initial_indent="    ", subsequent_indent="    ")]
    return "\n".join(lines)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"sprint {__version__}")
        raise SystemExit(0)


@app.command(help=_run_help())
def run() -> None:
    """Run Sprint in the foreground."""
    with reporting():
        loaded = config.load()
        logs.configure(loaded.log_format)
        from sprint.app import serve  # noqa: PLC0415 - the other commands need not wait for all of Sprint to load

        serve(loaded)


@app.command()
def watch(
    address: Annotated[str, typer.Argument(help="The stream's host:port. Default: STREAM_BIND.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON an event, no table.")] = False,
    key: Annotated[
        str | None,
        typer.Option(
            envvar="SPRINT_KEY",
            help="The subscriber key; without one: the free tier. Every user of this host can read a command's "
            "options, not its environment.",
        ),
    ] = None,
    since: Annotated[
        int | None, typer.Option(min=1, help="Replay from this sequence on, if it is still there.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many events.")] = None,
) -> None:
    """Subscribe to the stream and show each event."""
    with reporting():
        from sprint.watch import watch as show  # noqa: PLC0415

        stream = _address(address, lambda: config.load().stream_bind, STREAM_PORT)
        show(str(stream), as_json=as_json, key=key, since=since, count=count)


@app.command()
def status(
    address: Annotated[str, typer.Argument(help="The API's host:port. Default: API_BIND.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The API's answers as one JSON object.")] = False,
) -> None:
    """Ask a running Sprint how it is.

    Exit code 0 when it is healthy, else 1.
    """
    with reporting():
        api = _address(address, lambda: config.load().api_bind, API_PORT)
        answers = {name: ask(api, question) for name, question in QUESTIONS.items()}
        try:
            healthy = answers["health"]["status"] == "ok"
            if not as_json:
                _show_status(answers)
        except (KeyError, TypeError, AttributeError):
            raise NoAnswerError(f"http://{api}/api: the answers aren't Sprint's") from None
        if as_json:
            print_json(answers, indent=2)
        raise SystemExit(0 if healthy else 1)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list of findings.")] = False,
    clean: Annotated[bool, typer.Option("--clean", help="Remove what a killed run has left on this host.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Don't compile the kernel bypass's programs (3 s).")] = False,
) -> None:
    """Examine what this host can do, and the remedies.

    Exit code 0 when it can do what the configuration promises, else 1.
    """
    with reporting():
        from sprint.doctor import as_dicts, examine, exit_code, remove_leftovers  # noqa: PLC0415
        from sprint.doctor.report import table  # noqa: PLC0415

        if clean:
            removed = remove_leftovers()
            for line in removed:
                print(f"removed: {line}")
            if not removed:
                print("sprint: nothing was left behind", file=sys.stderr)
            return
        loaded = config.load()
        with _telling("Examining; compiling the kernel bypass's programs takes some seconds (--quick: not done)"):
            findings = examine(loaded, quick=quick)
        if as_json:
            print_json(as_dicts(findings), indent=2)
        else:
            Console().print(table(findings))
        raise SystemExit(exit_code(findings))


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="Relay a few blocks, print a summary, exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The summary as one JSON object.")] = False,
    blocks: Annotated[int, typer.Option(min=1, max=10_000, help="How many blocks --once mines.")] = 5,
    subscribers: Annotated[int, typer.Option(min=1, max=64, help="How many subscribers, a process each.")] = 4,
    interval: Annotated[float, typer.Option(min=0.01, max=600, help="Seconds from block to block.")] = 2.0,
) -> None:
    """Run the whole product on a regtest node of its own.

    A node that mines, Sprint, and subscribers that check every hash, each a process of its own.
    """
    with reporting():
        from sprint.demo.stage import Plan, perform  # noqa: PLC0415

        plan = Plan(once=once, as_json=as_json, blocks=blocks, subscribers=subscribers, interval_s=interval)
        raise SystemExit(perform(plan))


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="bulk, detect, end-to-end, fanout, ring, stream or wire.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", dir_okay=False, help="Draw it: detect, fanout, ring, stream."),
    ] = None,
    subscribers: Annotated[
        int | None,
        typer.Option(min=1, max=1_000_000, help="stream, fanout, end-to-end: at most. Default: 10,000."),
    ] = None,
    announcements: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="detect: of each mode. end-to-end: blocks. Default: 2,000; 3,000."),
    ] = None,
) -> None:
    """Measure, beside others in the same run.

    Progress goes to standard error.
    """
    with reporting():
        from sprint.bench.run import BENCHMARKS, Options, report  # noqa: PLC0415

        wrong = None
        if name not in BENCHMARKS:
            wrong = f"no benchmark {name!r}: one of {', '.join(BENCHMARKS)}"
        elif plot is not None and BENCHMARKS[name].plot is None:
            wrong = f"--plot: nothing to draw of {name}"
        elif subscribers is not None and not BENCHMARKS[name].takes_subscribers:
            wrong = f"--subscribers: {name} has none"
        elif announcements is not None and not BENCHMARKS[name].takes_announcements:
            wrong = f"--announcements: {name} has none"
        if wrong:
            raise UsageError(wrong)
        report(name, Options(subscribers, announcements), as_json=as_json, plot=plot)


def _show_status(answers: dict[str, Any]) -> None:
    console = Console()
    health, bypass = answers["health"], answers["turbo-status"]["kernelBypass"]
    console.print(f"{health['status']}: tier {health['tier']}, {health['network']}, engine {health['engine']}")
    for problem in health.get("problems", []):
        console.print(f"[red]{escape(problem)}[/]")
    console.print(f"kernel bypass: {'active' if bypass['active'] else 'inactive: ' + str(bypass['reason'])}")
    table = Table("source", "connected", "blocks", "first", "agent", box=None, pad_edge=False)
    for source in answers["sources"]["sources"]:
        values = (source["name"], source["connected"], source["sightings"], source["first"], source["agent"])
        table.add_row(*(escape(str(value)) for value in values))
    console.print(table)
    for block in answers["blocks"]["blocks"]:
        console.print(f"{block['height']} {block['hash']} {' '.join(block['state'])}")


def main() -> None:
    """Entry point of `sprint`."""
    _command("sprint")


def daemon() -> None:
    """Entry point of `sprintd`: `sprint run` under the name that service managers look for."""
    _command(Path(sys.argv[0]).name, "run")


def _command(name: str, *first: str) -> None:
    prepare_streams()
    with reporting():  # for what is printed, and refused, before a command has begun
        app(args=[*first, *sys.argv[1:]], prog_name=name)


if __name__ == "__main__":
    main()
