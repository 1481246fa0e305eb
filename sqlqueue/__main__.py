"""`python -m sqlqueue` is the command line."""

from sqlqueue.cli import main

if __name__ == "__main__":
    main(prog_name="sqlqueue")
