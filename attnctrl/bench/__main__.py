"""`python -m attnctrl.bench`, the same as `attnctrl bench`."""

import argparse

from attnctrl.bench import add_arguments, main

parser = argparse.ArgumentParser(prog="attnctrl bench", description="Measure methods side by side.")
add_arguments(parser)

if __name__ == "__main__":
    raise SystemExit(main(parser.parse_args()))
