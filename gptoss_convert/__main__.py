"""`gptoss-convert` and `python -m gptoss_convert`: the command line."""

from gptoss_convert.cli import main

if __name__ == "__main__":
    main()
