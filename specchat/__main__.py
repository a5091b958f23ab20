"""The `specchat` command, and `python -m specchat`."""

import os
import signal


def main() -> None:
    """Run the command line; Ctrl-C ends the program without a traceback, even while it starts."""
    if "_SPECCHAT_COMPLETE" in os.environ:  # the shell asks for completions: there is nobody to tell anything
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from specchat.cli.app import main as run

        run()
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
