"""``trimig``, and ``python -m trimig``: the command."""

from .cli.signals import ProcessSignals


def main() -> None:
    """Run the command that ``sys.argv`` names, and end the process with its exit code."""
    ProcessSignals().install()
    from .cli import main as command

    command(prog_name="trimig")


if __name__ == "__main__":
    main()
