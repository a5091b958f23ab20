"""The `specchat` command: options in, exit codes out; the only part that uses typer."""
