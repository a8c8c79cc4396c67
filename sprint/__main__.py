"""`python -m sprint` is the `sprint` command."""

import signal


def main() -> None:
    """Load the command and become it; meanwhile, a third of a second, Ctrl-C ends us without a word."""
    asked = signal.getsignal(signal.SIGINT)
    if asked is signal.default_int_handler:  # else it was ignored when we were started, and stays so
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sprint import cli  # noqa: PLC0415 - that is what takes the time

    signal.signal(signal.SIGINT, asked)
    cli.main()


if __name__ == "__main__":
    main()
