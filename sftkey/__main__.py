"""`python -m sftkey`: the command line, where its script isn't on the path."""

from sftkey.cli import main

if __name__ == "__main__":
    main()
