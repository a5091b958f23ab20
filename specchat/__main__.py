"""`python -m specchat`."""

from specchat.cli.app import main

if __name__ == "__main__":
    main()
