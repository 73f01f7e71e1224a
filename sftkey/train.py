"""`python -m sftkey.train RECIPE`, which every launcher can start: the same as `sftkey train`."""

import sys

from sftkey.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
