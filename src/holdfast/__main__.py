"""``python -m holdfast``: the command line, for torchrun above all."""

from .cli import main

if __name__ == "__main__":
    main()
