"""`python -m sprint` is the `sprint` command."""

import signal

if __name__ == "__main__":
    # Loading takes a third of a second, in which Ctrl-C ends us as any program that doesn't ask for more.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sprint.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
