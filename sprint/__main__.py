"""`python -m sprint` is the `sprint` command."""

import signal

if __name__ == "__main__":
    # Loading takes a third of a second, in which Ctrl-C ends us as any program that doesn't ask for more; not at all if
    # it was ignored when we were started.
    asked = signal.getsignal(signal.SIGINT)
    if asked is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sprint.cli import main

    signal.signal(signal.SIGINT, asked)
    main()
