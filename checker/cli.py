"""The command line: declares what there is; each body calls the module of its verb, which is imported then."""

from __future__ import annotations

import sys
from typing import Any

import click

from checker.errors import FAULT, INTERRUPTED, USAGE, OurFault, UserError

DAY = click.argument("day", required=False)
BENCHES = ("mha", "gqa", "mqa", "mla", "deepseek")


class Commands(click.Group):
    """A group that lists its commands in the order in which a learner meets them, and suggests the nearest for a typo."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of this file."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find a command; an unknown one gets the nearest name."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f"; did you mean `kata {near[0]}`?" if near else "; `kata --help` lists them."
            raise click.UsageError(f"There is no command {args[0]!r}{hint}", ctx) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--track", metavar="DIR", envvar="KATA_TRACK", help="Another track's folder in place of the built-in one."
)
@click.version_option(package_name="torch-katas", prog_name="kata")
@click.pass_context
def kata(ctx: click.Context, track: str | None) -> None:
    """32 daily PyTorch exercises, from tensors to a DeepSeek model.

    Begin with `kata next`, write code in the file that it names, then `kata check`.
    """
    from checker.app import App

    ctx.obj = App(track)


@kata.command("next")
@click.pass_obj
def next_(app: Any) -> None:
    """Fetch the next exercise and show its lesson (makes the workspace at the first call)."""
    from checker.commands import fetch

    fetch.next_(app)


@kata.command()
@click.argument("day")
@click.pass_obj
def start(app: Any, day: str) -> None:
    """Fetch a day of your choice: `kata start 16`."""
    from checker.commands import fetch

    fetch.start(app, day)


@kata.command()
@DAY
@click.option("--all", "everything", is_flag=True, help="Check every day that is fetched.")
@click.option("--task", metavar="NAME", help="Only the tests of this task.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda", "mps"]), default="cpu", show_default=True, help="Where to run."
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Replay the random values of an earlier check.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
@click.option("--junit", type=click.Path(dir_okay=False), metavar="FILE", help="Also write the verdict as JUnit XML.")
@click.pass_obj
def check(app: Any, day: str | None, **options: Any) -> None:
    """Check a day (default: the file saved last) and say what to do next."""
    from checker.commands import check as verb

    sys.exit(verb.check(app, day, **options))


@kata.command()
@DAY
@click.option("--polling", is_flag=True, help="Look at the files instead of waiting for events (network folders).")
@click.pass_obj
def watch(app: Any, day: str | None, polling: bool) -> None:
    """Check at every save, in a warm process, on a screen of its own."""
    from checker import watch as verb

    verb.watch(app, day, polling=polling)


@kata.command()
@click.argument("task", required=False)
@click.option("--day", help="Of another day than the one worked on last.")
@click.pass_obj
def hint(app: Any, task: str | None, day: str | None) -> None:
    """Show one more hint for a task (three rungs: where to look, which idea, nearly the step)."""
    from checker.commands import read

    read.hint(app, task, day)


@kata.command()
@DAY
@click.pass_obj
def lesson(app: Any, day: str | None) -> None:
    """Show the lesson of a day."""
    from checker.commands import read

    read.lesson(app, day)


@kata.command()
@click.pass_obj
def status(app: Any) -> None:
    """Show what is done, what is under way and what is next."""
    from checker.commands import status as verb

    verb.status(app)


@kata.command()
@DAY
@click.option("--give-up", is_flag=True, help="Show it although the day is not passed; this is recorded.")
@click.pass_obj
def solution(app: Any, day: str | None, give_up: bool) -> None:
    """Show the reference solution of a day that you passed."""
    from checker.commands import solution as verb

    verb.solution(app, day, give_up)


@kata.command()
@DAY
@click.pass_obj
def diff(app: Any, day: str | None) -> None:
    """Compare your code with the reference (after passing)."""
    from checker.commands import solution as verb

    verb.diff(app, day)


@kata.command()
@DAY
@click.option("--limit", default=20, show_default=True, help="How many attempts.")
@click.pass_obj
def history(app: Any, day: str | None, limit: int) -> None:
    """List the attempts at a day and the snapshots of its code."""
    from checker.commands import history as verb

    verb.history(app, day, limit)


@kata.command()
@click.argument("snapshot")
@click.option("--day", help="Of another day than the one worked on last.")
@click.pass_obj
def restore(app: Any, snapshot: str, day: str | None) -> None:
    """Put a snapshot of `kata history` back into your file (what is there now is kept as a snapshot)."""
    from checker.commands import history as verb

    verb.restore(app, snapshot, day)


@kata.command()
@DAY
@click.pass_obj
def reset(app: Any, day: str | None) -> None:
    """Put the stub back into your file (what is there now is kept as a snapshot)."""
    from checker.commands import history as verb

    verb.reset(app, day)


@kata.command()
@click.pass_obj
def doctor(app: Any) -> None:
    """Look at the installation, the devices and the protections that are active on this machine."""
    from checker.commands import doctor as verb

    sys.exit(verb.doctor(app))


@kata.command()
@click.argument("what", nargs=-1, type=click.Choice(BENCHES))
@click.option(
    "--device", type=click.Choice(["cpu", "cuda", "mps"]), default="cpu", show_default=True, help="What to measure."
)
@click.option(
    "--seconds", type=click.FloatRange(0.05, 60), default=0.5, show_default=True, help="How long each thing is timed."
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False), metavar="FILE", help="Also write everything as JSON."
)
@click.option(
    "--png",
    "png_file",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Also draw the roofline (needs the extra `plots`).",
)
def bench(what: tuple[str, ...], **options: Any) -> None:
    """Measure decoding: attention with every kind of cache, and a DeepSeek model (all by default)."""
    from checker.commands import bench as verb

    verb.bench(what or BENCHES, **options)


@kata.command()
@click.argument("folder", metavar="DIR")
@click.pass_obj
def init(app: Any, folder: str) -> None:
    """Make another folder a workspace."""
    from checker.commands import fetch

    fetch.init(app, folder)


@kata.command("export")
@click.argument("file", metavar="FILE")
@click.pass_obj
def export_(app: Any, file: str) -> None:
    """Write your progress to a JSON file (`-` for standard output)."""
    from checker.commands import transfer

    transfer.export(app, file)


@kata.command("import")
@click.argument("file", metavar="FILE")
@click.pass_obj
def import_(app: Any, file: str) -> None:
    """Merge the progress of another machine from its export."""
    from checker.commands import transfer

    transfer.import_(app, file)


@kata.command()
@click.argument("slug")
@click.pass_obj
def new(app: Any, slug: str) -> None:
    """For instructors: make a new kata from a template, `kata new day33_my_topic`."""
    from checker.commands import new as verb

    verb.new(app, slug)


@kata.command()
@click.argument("katas", nargs=-1)
@click.option("--fresh", is_flag=True, help="Prove again, whatever the stored proof says.")
@click.option("--stale", is_flag=True, help="Only list the katas whose stored proof is missing or stale.")
@click.pass_obj
def verify(app: Any, katas: tuple[str, ...], fresh: bool, stale: bool) -> None:
    """For instructors: prove that katas are sound (all of the track by default)."""
    from checker.commands import verify as verb

    sys.exit(verb.run(app, katas, fresh=fresh, stale=stale))


def main() -> None:
    """The entry point: expected errors are one sentence, bugs go to a log file."""
    try:
        status = kata.main(prog_name="kata", standalone_mode=False)
    except click.exceptions.Exit as done:
        status = done.exit_code
    except click.exceptions.Abort:
        status = INTERRUPTED
    except click.ClickException as error:
        click.echo(f"kata: {error.format_message()}", err=True)
        status = USAGE
    except UserError as error:
        click.echo(f"kata: {error}", err=True)
        status = error.exit_code
    except KeyboardInterrupt:
        click.echo("kata: interrupted", err=True)
        status = INTERRUPTED
    except BrokenPipeError:
        status = 0
        sys.stdout = None
    except SystemExit:
        raise
    except Exception as error:
        status = FAULT
        click.echo(_fault(error), err=True)
    sys.exit(status or 0)


def _fault(error: Exception) -> str:
    """Write the traceback of a bug of ours to a log file, and say where it is."""
    import datetime
    import tempfile
    import traceback

    import checker

    lines = [
        f"torch-katas, {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M:%S} UTC",
        f"python {sys.version}",
        f"argv {sys.argv[1:]}",
        f"program {checker.__path__}",
    ]
    lines += traceback.format_exception(type(error), error, error.__traceback__)
    what = str(error) if isinstance(error, OurFault) else f"{type(error).__name__}: {error}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="kata-log-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write("\n".join(lines))
        return f"kata: a fault of the program, not yours: {what}. The details are in {file.name}; please report them."
    except OSError:
        return f"kata: a fault of the program, not yours: {what}."


if __name__ == "__main__":
    main()
