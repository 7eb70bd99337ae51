"""The earlier spelling of `python -m lora_nlu.report similarity`."""

import sys

from lora_nlu.report.__main__ import main

if __name__ == "__main__":
    sys.exit(main(command="similarity"))
