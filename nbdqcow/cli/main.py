"""``nbdqcow``: the command of commands."""

import sys

from nbdqcow import __version__
from nbdqcow.cli.messages import describe, error
from nbdqcow.cli.program import run_program
from nbdqcow.errors import NbdQcowError


def main() -> int:
    """Run the command that the command line names; return its exit status."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    # These read their command lines as QEMU's tools do, not as click does.
    if command == "img":
        from nbdqcow.cli.img import script as img

        sys.argv[:2] = ["nbdqcow-img"]
        img()
    if command == "nbd":
        from nbdqcow.cli.nbd import main as nbd_main

        sys.argv[:2] = ["nbdqcow-nbd"]
        return nbd_main()
    return run_program(_click_main)


def _click_main() -> int:
    import click

    from nbdqcow.cli.serve import serve

    group = click.Group(
        "nbdqcow",
        commands=[
            serve,
            click.Command("img", short_help="The options of qemu-img."),
            click.Command("nbd", short_help="The options of qemu-nbd."),
        ],
        help="Disk images over NBD.",
    )
    group = click.version_option(__version__, message="nbdqcow %(version)s")(group)
    try:
        return int(group.main(prog_name="nbdqcow", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=True)
        return 2
    except click.ClickException as exc:
        error(exc.format_message())
        context = getattr(exc, "ctx", None)
        path = context.command_path if context is not None else "nbdqcow"
        error(f"try '{path} --help'")
        return 2
    except click.Abort:
        return 130
    except NbdQcowError as exc:
        error(describe(exc))
        return 1
