"""``python -m trimig`` is the command ``trimig``."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="trimig")
